"""Which settings a cut is recovered with: the cheapest that is within one standard error of the best.

Settings are tried one after the other, from the defaults: the iterations with their way, the ridge of the head, the
strength of the repair. Every option is measured on the same tasks, so what counts is the difference to the best option
task by task, and the standard error of its mean. The rule is that of Breiman et al. (Classification and Regression
Trees, 1984, section 3.4.3), with paired differences. Cheapest means fewest iterations; a strength keeps its default
unless another is better by more than that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import numpy.typing as npt
from kiridashi.errors import InputError

from kiridashi_server.recover.iterations import RecoverSettings

DEFAULT = RecoverSettings()

FEWEST_NEW = 2
"""Tasks that have to play new: a standard error needs two."""

_FACTORS = (1.0, 4.0, 0.25)
_PAIRS = ((0, None), (20, 0.5), (20, 1.0), (50, 0.5))
_TINY = 1e-9

Play = Callable[[RecoverSettings], Sequence[float]]
"""From settings to the accuracy of every task, in the same order for all settings."""


class Row(msgspec.Struct, frozen=True):
    """One option.

    Attributes:
        settings: the option.
        accuracy: mean over the tasks.
        behind: mean of what the best option has more, task by task.
        error: standard error of that.
    """

    settings: RecoverSettings
    accuracy: float
    behind: float
    error: float


class Step(msgspec.Struct, frozen=True):
    """What was tried for one setting: all options, the cheapest first, and the number of the chosen one."""

    setting: str
    rows: tuple[Row, ...]
    chosen: int

    def told(self, row: Row) -> str:
        """The setting of that option, in words."""
        settings = row.settings
        if self.setting == "iterations":
            return described(settings)
        return f"{self.setting} {settings.ridge if self.setting == 'ridge' else settings.repair_strength:g}"

    @property
    def row(self) -> Row:
        """The chosen option."""
        return self.rows[self.chosen]

    @property
    def best(self) -> Row:
        """The option with the best mean, the cheapest of them."""
        return next(row for row in self.rows if row.behind <= _TINY)


class Choice(msgspec.Struct, frozen=True):
    """Settings, why, in words, and what was measured; no steps where nothing was."""

    settings: RecoverSettings
    reason: str
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True, eq=False)
class Verdict:
    """Which of some options is taken, and how far each is behind the best: mean and standard error, float64 [options].

    The best is behind itself by zero, without error.
    """

    chosen: int
    behind: npt.NDArray[np.float64]
    error: npt.NDArray[np.float64]


def within_one_error(accuracies: npt.NDArray[np.float64]) -> Verdict:
    """The first option whose mean is at most one standard error behind the best.

    Args:
        accuracies: float64 [options, tasks], the cheapest option first, at least two tasks.

    Raises:
        InputError: no option, or fewer than two tasks.
    """
    if accuracies.ndim != 2 or not len(accuracies) or accuracies.shape[1] < FEWEST_NEW:
        raise InputError(
            "options need accuracies on the same two or more tasks", why=f"their shape is {list(accuracies.shape)}"
        )
    means = accuracies.mean(axis=1)
    best = int(np.argmax(means >= means.max() - _TINY))
    lost = accuracies[best] - accuracies
    behind = lost.mean(axis=1)
    error = lost.std(axis=1, ddof=1) / np.sqrt(accuracies.shape[1])
    return Verdict(int(np.argmax(behind <= error + _TINY)), behind, error)


def settle(play: Play, start: RecoverSettings = DEFAULT) -> Choice:
    """Try the options of one setting after the other, each with what was chosen before.

    Args:
        play: measures an option; asked once for each.
        start: the defaults.

    Raises:
        InputError: see :func:`within_one_error`.
    """
    settings, steps = start, []
    measured: dict[RecoverSettings, Sequence[float]] = {}
    for name, options_of in OPTIONS.items():
        options = options_of(settings)
        measured |= {option: play(option) for option in options if option not in measured}
        accuracies = np.array([measured[option] for option in options], dtype=np.float64)
        verdict = within_one_error(accuracies)
        means = accuracies.mean(axis=1)
        rows = [
            Row(option, float(mean), float(behind), float(error))
            for option, mean, behind, error in zip(options, means, verdict.behind, verdict.error, strict=True)
        ]
        steps.append(Step(name, tuple(rows), verdict.chosen))
        settings = steps[-1].row.settings
    return Choice(settings, _reason(steps, len(measured[settings])), tuple(steps))


def unsettled(why: str, settings: RecoverSettings = DEFAULT) -> Choice:
    """The defaults, and why nothing better is known."""
    return Choice(settings, f"{described(settings)}: the default, because {why}")


def described(settings: RecoverSettings) -> str:
    """The iterations in words."""
    if not settings.iterations:
        return "0 iterations"
    way = "all" if settings.way == 1 else f"{settings.way:.0%}"
    return f"{settings.iterations} iterations, {way} of their way"


def _pairs(settings: RecoverSettings) -> tuple[RecoverSettings, ...]:
    return tuple(
        replace(settings, iterations=iterations, way=settings.way if way is None else way) for iterations, way in _PAIRS
    )


def _ridges(settings: RecoverSettings) -> tuple[RecoverSettings, ...]:
    return tuple(replace(settings, ridge=factor * settings.ridge) for factor in _FACTORS)


def _strengths(settings: RecoverSettings) -> tuple[RecoverSettings, ...]:
    return tuple(replace(settings, repair_strength=factor * settings.repair_strength) for factor in _FACTORS)


OPTIONS: Mapping[str, Callable[[RecoverSettings], tuple[RecoverSettings, ...]]] = {
    "iterations": _pairs,
    "ridge": _ridges,
    "repair strength": _strengths,
}
"""What is tried, in this order; the cheapest option first, which is the default one for strengths."""

PLAYED = sum(len(options(DEFAULT)) for options in OPTIONS.values()) - len(OPTIONS) + 1
"""Different options that are measured: every later setting begins with the one chosen before."""


def _reason(steps: Sequence[Step], tasks: int) -> str:
    first, *strengths = steps
    on = f"on {tasks} tasks that played new"
    if first.row.behind <= _TINY:
        why = f"the best {on}"
    else:
        lead = f"{described(first.best.settings)}, {100 * first.row.behind:.1f} points more"
        why = f"within one standard error of the best {on} ({lead})"
    changed = [step.told(step.row) for step in strengths if step.chosen]
    return ", ".join([f"{first.told(first.row)}: {why}", *changed])
