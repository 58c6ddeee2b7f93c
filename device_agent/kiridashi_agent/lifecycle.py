"""The life of a line's update: one table of (phase, event) to (action, next phase). Pure.

The agent writes the next phase to its journal, then carries out the action, and the action's outcome is the
next
event. So after a crash the journal says which action to do again; every action may be done twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from kiridashi.errors import StateError
from kiridashi.messages import Phase

Event = Literal[
    "desired",  # the server wants another target
    "fetched",  # the manifest is here and trusted
    "offline",  # the broker or the server cannot be reached just now
    "retry",  # the waiting time is over
    "downloaded",  # every needed file of the bundle is here and checked
    "probed",  # at least one candidate gives the manifest's outputs on this device
    "chosen",  # a measured candidate is inside the budget; nothing to tune
    "chosen-for-tuning",  # the same, and local tuning follows
    "tuned",  # tuning ended, kept or not
    "validated",  # the slot is complete and what it holds is what was measured
    "activated",  # the pointer stands on the new slot
    "refused",  # this target will not do, for good
    "undone",  # somebody went back to the previous model
]
Action = Literal["none", "wait", "fetch", "download", "probe", "measure", "tune", "validate", "activate", "discard"]
PHASES: tuple[Phase, ...] = get_args(Phase)
EVENTS: tuple[Event, ...] = get_args(Event)
RESTING: frozenset[Phase] = frozenset({"idle", "active", "rejected", "rolled-back"})


@dataclass(frozen=True)
class Step:
    """What an event leads to: do ``action`` once ``phase`` is in the journal."""

    action: Action
    phase: Phase


_ENTRY: dict[Phase, Action] = {
    "fetching": "fetch",
    "downloading": "download",
    "probing": "probe",
    "measuring": "measure",
    "tuning": "tune",
    "validating": "validate",
    "activating": "activate",
}
TABLE: dict[tuple[Phase, Event], Step] = {
    ("fetching", "fetched"): Step("download", "downloading"),
    ("fetching", "offline"): Step("wait", "fetching"),
    ("fetching", "retry"): Step("fetch", "fetching"),
    ("fetching", "refused"): Step("none", "rejected"),
    ("downloading", "downloaded"): Step("probe", "probing"),
    ("downloading", "offline"): Step("wait", "downloading"),
    ("downloading", "retry"): Step("download", "downloading"),
    ("probing", "probed"): Step("measure", "measuring"),
    ("measuring", "chosen"): Step("validate", "validating"),
    ("measuring", "chosen-for-tuning"): Step("tune", "tuning"),
    ("tuning", "tuned"): Step("validate", "validating"),
    ("validating", "validated"): Step("activate", "activating"),
    ("activating", "activated"): Step("none", "active"),
    **{(phase, "desired"): Step("fetch", "fetching") for phase in PHASES},
    **{(phase, "undone"): Step("none", "rolled-back") for phase in RESTING},
    **{(phase, "refused"): Step("discard", "rejected") for phase in _ENTRY if phase != "fetching"},
}


def advance(phase: Phase, event: Event) -> Step:
    """What ``event`` means in ``phase``.

    Raises:
        StateError: the event cannot happen in this phase.
    """
    step = TABLE.get((phase, event))
    if step is None:
        raise StateError(
            f"the event '{event}' cannot happen while a line is '{phase}'",
            next_step="wait until the line rests (kiridashi-agent status), then try again",
        )
    return step


def resume(phase: Phase) -> Action:
    """The action to carry out (again) when the agent starts and finds a line in ``phase``."""
    return _ENTRY.get(phase, "none")
