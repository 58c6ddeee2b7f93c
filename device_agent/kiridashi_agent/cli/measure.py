"""``kiridashi-agent measure``: what a model file needs on this device."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec
from kiridashi.budget import MIB, Budget, Measurement, judge
from kiridashi.command import Command, Outcome
from kiridashi.errors import ExitCode

from kiridashi_agent import jobs


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="an .onnx or .tflite file")
    parser.add_argument("--budget", default="", help="judge by it: memory=96MiB,file=4MiB,latency=5ms")
    parser.add_argument("--threads", type=int, default=1, help="threads inside one prediction")


def _run(arguments: argparse.Namespace) -> Outcome:
    budget = Budget.parse(arguments.budget)
    rows, texts, code = [], [], ExitCode.OK
    for path in arguments.files:
        measured = jobs.measure_file(path, arguments.threads)
        verdict = judge(budget, measured)
        rows.append(
            {
                "file": str(path),
                "measured": msgspec.to_builtins(measured),
                "verdict": msgspec.to_builtins(verdict),
            }
        )
        texts.append(f"{path}: {_numbers(measured)}")
        if arguments.budget:
            texts.append(f"  {verdict.describe(budget, measured)}")
        if not verdict.within:
            code = ExitCode.BUDGET
    return Outcome({"budget": str(budget), "files": rows}, "\n".join(texts), code)


def _numbers(measured: Measurement) -> str:
    notes = f"; {', '.join(measured.notes)}" if measured.notes else ""
    return (
        f"p50 {measured.latency_p50_ms:.3g} ms, p95 {measured.latency_p95_ms:.3g} ms, "
        f"p99 {measured.latency_p99_ms:.3g} ms over {measured.runs} runs; peak memory "
        f"{measured.memory_bytes / MIB:.1f} MiB; load {measured.load_ms:.0f} ms; {measured.runtime}, "
        f"{measured.threads} thread(s), {measured.hardware} hardware{notes}"
    )


COMMANDS = (Command("measure", "measure model files on this device", _configure, _run),)
