"""``kiridashi front``: how much of a task's importance every size can keep, as numbers and as a picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from kiridashi.artifacts import write_atomic
from kiridashi.budget import MIB, Limit
from kiridashi.command import Command, Outcome
from kiridashi.errors import InputError

from kiridashi_server.cli.bank_source import others_text
from kiridashi_server.cli.profile_source import PROFILE_HELP, read_profile
from kiridashi_server.cli.task_source import TASK_HELP, few_samples, read_task

if TYPE_CHECKING:
    from kiridashi_server.budget.profile import Profile
    from kiridashi_server.graph.polynomial import Polynomial
    from kiridashi_server.graph.quantities import Quantities

_PARAMETERS = "parameters"
_SIZES = (_PARAMETERS, *get_args(Limit))
_UNITS = {
    _PARAMETERS: (1e6, "million parameters"),
    "memory": (MIB, "MiB of memory"),
    "file": (MIB, "MiB of file"),
    "latency": (1.0, "ms (p95)"),
}


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", required=True, metavar="TASK", help=TASK_HELP)
    parser.add_argument(
        "--bank", type=Path, default=Path("bank"), metavar="DIR", help="the score bank (default: ./bank)"
    )
    parser.add_argument("--backbone", default="efficientnet-lite0", metavar="NAME", help="the backbone to cut")
    parser.add_argument("--image-size", type=int, default=64, metavar="PIXELS", help="side of the input (default 64)")
    parser.add_argument("--size", choices=_SIZES, default=_PARAMETERS, help="what is limited (default parameters)")
    parser.add_argument("--profile", type=Path, metavar="FILE", help=PROFILE_HELP)
    parser.add_argument("--points", type=int, default=40, metavar="N", help="sizes to solve for (default 40)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the picture there, as SVG")
    parser.add_argument("--per-class", type=int, default=0, metavar="N", help="use this many samples per class only")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random")


def _run(arguments: argparse.Namespace) -> Outcome:
    profile = read_profile(arguments.profile) if arguments.profile else None
    if arguments.size != _PARAMETERS and profile is None:
        raise InputError(
            f"a front over {arguments.size} needs a device's profile",
            next_step="pass --profile FILE, or leave --size out",
        )
    import torch  # takes seconds: bad arguments are refused first

    from kiridashi_server.backbone import Backbone
    from kiridashi_server.bank.assessments import AssessmentStore
    from kiridashi_server.bank.store import Bank
    from kiridashi_server.budget.candidates import candidates
    from kiridashi_server.budget.front import front
    from kiridashi_server.compose.selection import DEFAULT_MULTIPLE
    from kiridashi_server.pipeline import compose_scores
    from kiridashi_server.report.charts import importance_against_size

    torch.set_num_threads(1)  # the same numbers on every machine, and no spinning on a busy one
    task = read_task(arguments.task, arguments.image_size, arguments.seed)
    samples = few_samples(task, arguments.per_class, arguments.seed)
    backbone = Backbone.load(arguments.backbone, image_size=arguments.image_size)
    with Bank.open(arguments.bank, create=False) as bank:
        records = bank.list(backbone_fingerprint=backbone.fingerprint)
        stack, backbones = bank.stack(backbone.fingerprint, backbone.layout.digest), bank.backbones()
        assessments = AssessmentStore(bank.folder).list()
    _, mix = compose_scores(
        backbone, records, samples, len(task.labels), arguments.seed, stack, assessments=assessments
    )
    multiple = profile.multiple if profile else DEFAULT_MULTIPLE
    options = candidates(backbone.layout, mix.scores, multiple=multiple)
    found = front(options.choices, _needs(arguments.size, profile, backbone.quantities), points=arguments.points)
    rows = [
        {
            "size": point.cost,
            "parameters": backbone.costs.parameters(point.widths),
            "macs": backbone.costs.macs(point.widths),
            "importance": point.value / options.total,
            "bound": point.bound / options.total,
            "widths": point.widths,
        }
        for point in found
    ]
    scale, unit = _UNITS[arguments.size]
    if arguments.output:
        points = [(point.cost / scale, point.value / options.total) for point in found]
        write_atomic(arguments.output, importance_against_size(points, unit).encode())
    data = {"size": arguments.size, "points": rows, "picture": str(arguments.output) if arguments.output else None}
    data["other_backbones"] = sum(backbones.values()) - len(records)
    lines = [f"{point.cost / scale:10.3f}  {point.value / options.total:7.1%}" for point in found]
    return Outcome(
        data,
        "\n".join([f"{unit}, importance kept", *lines, *filter(None, [others_text(backbones, backbone.fingerprint)])]),
    )


def _needs(size: str, profile: Profile | None, quantities: Quantities) -> tuple[Polynomial, ...]:
    from kiridashi_server.budget.requirements import Requirements
    from kiridashi_server.graph.polynomial import counted

    if size == _PARAMETERS or profile is None:
        return (counted(quantities.costs.parameter_terms),)
    return Requirements.of(profile, quantities).needs[cast(Limit, size)]


COMMANDS = (Command("front", "show how much importance every size can keep", _configure, _run),)
