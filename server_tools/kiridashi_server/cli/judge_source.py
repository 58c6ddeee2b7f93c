"""The device of the fleet that ``--device`` names, as the judge of a cut."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kiridashi.errors import BudgetError, InputError

from kiridashi_server.cli.plant_state import opened_server

if TYPE_CHECKING:
    from kiridashi_server.backbone import Backbone
    from kiridashi_server.budget.profile import Profile
    from kiridashi_server.pipeline import Measure


@dataclass(frozen=True)
class Judged:
    """The device's profile, and what has files measured there."""

    profile: Profile
    measure: Measure


@contextmanager
def judged_by(arguments: argparse.Namespace, backbone: Backbone, say: Callable[[str], None]) -> Iterator[Judged | None]:
    """The judge for the time of a ``with`` block, ``None`` without ``--device``.

    What it measured is dropped when the block has come to an end, be it that nothing fits; an interrupted block leaves
    it to be found again.

    Raises:
        InputError: ``--runtime`` or ``--threads`` without ``--device``, an unknown device, or no profile that fits.
        StateError: there is no plant server in ``--state``.
    """
    if arguments.device is None:
        if arguments.runtime or arguments.threads:
            raise InputError("--runtime and --threads choose a profile of the device that --device names")
        yield None
        return
    from kiridashi_server.device_judge import DeviceJudge, profile_of

    with opened_server(arguments) as server:
        probes, profile = profile_of(server, arguments.device, backbone, arguments.runtime, arguments.threads)
        judge = DeviceJudge(
            server,
            arguments.device,
            probes,
            threads=profile.threads,
            timeout_s=arguments.timeout,
            seconds=arguments.seconds,
            say=say,
        )
        say(f"{arguments.device} is of the class '{profile.device_class}'; profile: {probes.name}")
        try:
            yield Judged(profile, judge)
        except BudgetError:
            judge.forget()
            raise
        judge.forget()
