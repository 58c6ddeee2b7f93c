"""``kiridashi quickstart``: the whole loop on embedded defaults."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec
from kiridashi.budget import Budget
from kiridashi.command import Command, Outcome


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("quickstart-out"), metavar="DIR", help="where everything goes")
    parser.add_argument("--task", default="", metavar="NAME", help="the shipped task to hold out as the new line")
    parser.add_argument("--budget", default="", metavar="LIMITS", help="such as memory=96MiB,file=5MiB,latency=2ms")
    parser.add_argument(
        "--settle", action="store_true", help="first let past tasks play new, to settle how cuts are recovered"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random")
    parser.add_argument(
        "--quick", action="store_true", help="three past tasks, one size, ONNX only: a smoke test in about a minute"
    )


def _run(arguments: argparse.Namespace) -> Outcome:
    from kiridashi_server.narrator import TITLES, Narrator  # torch takes seconds to import: only this command pays
    from kiridashi_server.quickstart.run import QUICK, Settings, run_quickstart

    settings = QUICK if arguments.quick else Settings()
    chosen = {"task": arguments.task} if arguments.task else {}
    settings = msgspec.structs.replace(
        settings,
        **chosen,
        seed=arguments.seed,
        budget=Budget.parse(arguments.budget) if arguments.budget else None,
        settle=arguments.settle,
    )
    stages = [name for name in TITLES if name != "settle" or arguments.settle]
    report = run_quickstart(settings, arguments.out, Narrator(stages))
    kept = report.plan.params_after / report.plan.params_before
    text = (
        f"accuracy on the new line: {report.device.test_accuracy_delivered:.1%} as delivered, "
        f"{report.device.test_accuracy_active:.1%} after tuning on the device\n"
        f"{kept:.0%} of the parameters, p95 {report.measured.latency_p95_ms:.2f} ms "
        f"(dense {report.dense.latency_p95_ms:.2f} ms)\n"
        f"open {arguments.out / 'report.html'}"
    )
    return Outcome(msgspec.to_builtins(report), text)


COMMANDS = (Command("quickstart", "run the whole loop on embedded defaults and write a report", _configure, _run),)
