"""What a long run says while it works: a heading a stage, a progress bar for everything long, on standard error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Display

from kiridashi_server.progress import Progress

TITLES = {
    "bank": "Learning scores of past tasks",
    "stock": "Pruning the backbone step by step on the past tasks, once for all lines",
    "settle": "Letting past tasks play new, to settle how cuts are recovered",
    "evidence": "Comparing the new task with the bank, composing scores",
    "profile": "Measuring this device with a few cuts",
    "plan": "Solving the budget into a plan",
    "cut": "Cutting once, recovering",
    "export": "Exporting ONNX, TFLite and the train step",
    "deliver": "Delivering over MQTT; the agent verifies, measures, tunes and activates",
    "predict": "Predicting through LineModel",
    "compare": "Comparing with other ways to choose the cut",
    "report": "Writing the report",
}


class Narrator:
    """Prints headings, facts and bars. Bars appear only on a terminal; headings and facts always.

    Args:
        stages: which of :data:`TITLES` the run has, in order.
    """

    def __init__(self, stages: Sequence[str] = tuple(TITLES)) -> None:
        self._stages = tuple(stages)
        self._console = Console(stderr=True, highlight=False)
        self._seen: set[str] = set()

    def stage(self, name: str, reused: bool) -> None:
        """Announce a stage; ``name`` may have a detail after a hyphen, as in ``bank-sports``."""
        head, _, detail = name.partition("-")
        if head not in self._seen:
            self._seen.add(head)
            number = self._stages.index(head) + 1
            self._console.print(f"[bold]{number:>2}/{len(self._stages)} {TITLES[head]}[/bold]")
        if detail or reused:
            self.fact(f"{detail}{' ' if detail and reused else ''}{'(reused from an earlier run)' if reused else ''}")

    def fact(self, text: str) -> None:
        """One indented line."""
        self._console.print(f"      {text}", markup=False)

    @contextmanager
    def bar(self, label: str) -> Iterator[Progress]:
        """A progress bar; call the yielded function with (done, total)."""
        columns = (TextColumn("      {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Display(*columns, console=self._console, transient=True) as display:
            bar = display.add_task(label, total=None)

            def advance(done: int, total: int) -> None:
                display.update(bar, completed=done, total=total)

            yield advance
