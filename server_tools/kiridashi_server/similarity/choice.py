"""Which similarity measure has earned weight: leave-one-task-out on the bank itself, against the constant ranking.

Static rankings beat transferability measures on common benchmarks, so the constant ranking, the uniform bank, has to be
beaten. Every assessed task has been cut by the uniform bank and by the bank tilted by each measure. A measure wins if
its mean gain over the uniform bank exceeds one standard error over the tasks; of several that are within one standard
error of the best, the cheapest does. Otherwise the uniform bank stays.

The best of several measures is flattered by being the best. How often a largest gain, in standard errors, is reached
when no measure is any use is estimated by turning the signs of the tasks' gains at random, all measures of a task
together, and told with the choice. It does not decide: a tilt that changes nothing costs nothing. Tasks share the
records that they are judged with, so all of this is somewhat too sure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kiridashi_server.similarity.assessment import UNIFORM, Assessment
from kiridashi_server.similarity.measure import MEASURES
from kiridashi_server.similarity.score_ranks import spearman

_LEAST_TASKS = 2
_SIGNS = 2000
_TINY = 1e-9


@dataclass(frozen=True)
class MeasureRow:
    """How one measure did over the tasks that it could compare; errors are standard errors of the means over tasks.

    Attributes:
        measure: its name.
        tasks: how many.
        spearman: mean rank correlation of similarity and utility over a task's records; 0 for the constant ranking.
        spearman_error: its standard error.
        gain: mean accuracy of the cut tilted by it, less that of the uniform bank.
        gain_error: its standard error.
        regret: mean accuracy that the best of all the task's cuts, known in hindsight, had above it.
        regret_error: its standard error.
    """

    measure: str
    tasks: int
    spearman: float
    spearman_error: float
    gain: float
    gain_error: float
    regret: float
    regret_error: float

    @property
    def wins(self) -> bool:
        """Whether it beats the constant ranking by more than one standard error."""
        return self.measure != UNIFORM and self.gain > self.gain_error


@dataclass(frozen=True)
class Choice:
    """The measure whose tilt is used (``uniform``: none), and why.

    Attributes:
        measure: its name.
        reason: why, in words.
        rows: all measures, the cheapest first.
        chance: how often the best of measures without any use would gain so many standard errors.
    """

    measure: str
    reason: str
    rows: tuple[MeasureRow, ...]
    chance: float = 1.0


def choose_measure(assessments: Sequence[Assessment], *, seed: int = 0) -> Choice:
    """Choose by the assessments; each is one task that was kept out of the records it was judged with.

    Args:
        assessments: complete, of one backbone, layout and settings.
        seed: of the random signs.
    """
    rows = tuple(row for name in MEASURES if (row := _row(name, assessments)).tasks >= _LEAST_TASKS)
    tried = [row for row in rows if row.measure != UNIFORM]
    if not tried:
        return Choice(UNIFORM, f"{len(assessments)} assessed tasks say nothing about measures yet", rows)
    chance = _chance([row.measure for row in tried], assessments, seed)
    winners = [row for row in tried if row.wins]
    if not winners:
        best = max(tried, key=lambda row: row.gain)
        return Choice(UNIFORM, f"all records weigh the same: the best measure, {_described(best)}", rows, chance)
    best = max(winners, key=lambda row: row.gain)
    chosen = next(row for row in winners if row.gain >= best.gain - best.gain_error)
    luck = f"by chance alone the best of {len(tried)} would do so in {chance:.0%} of cases"
    return Choice(chosen.measure, f"records weigh by similarity: {_described(chosen)}; {luck}", rows, chance)


def _chance(names: Sequence[str], assessments: Sequence[Assessment], seed: int) -> float:
    """The share of random signs, the true ones among them, with a largest t value at least as large as the true."""
    gained = np.array([[a.composed.get(name, np.nan) - a.composed[UNIFORM] for name in names] for a in assessments])
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(_SIGNS, len(gained), 1))
    signs[0] = 1
    turned = signs * gained
    counts = (~np.isnan(gained)).sum(axis=0)
    errors = np.nanstd(turned, axis=1, ddof=1) / np.sqrt(counts)
    largest = (np.nanmean(turned, axis=1) / np.maximum(errors, _TINY)).max(axis=1)
    return float((largest >= largest[0] - _TINY).mean())


def _row(name: str, assessments: Sequence[Assessment]) -> MeasureRow:
    compared = [a for a in assessments if name in a.composed and UNIFORM in a.composed]
    correlations = np.array([_correlation(name, assessment) for assessment in compared])
    gained = np.array([a.composed[name] - a.composed[UNIFORM] for a in compared])
    regrets = np.array(
        [max((*a.utilities.values(), *a.composed.values())) - a.composed[name] for a in compared], dtype=np.float64
    )
    return MeasureRow(
        name, len(compared), *_mean_and_error(correlations), *_mean_and_error(gained), *_mean_and_error(regrets)
    )


def _correlation(name: str, assessment: Assessment) -> float:
    similarities = assessment.similarities.get(name, {})
    common = [record_id for record_id in similarities if record_id in assessment.utilities]
    if len(common) < _LEAST_TASKS:
        return 0.0
    return spearman(
        np.array([similarities[record_id] for record_id in common]),
        np.array([assessment.utilities[record_id] for record_id in common]),
    )


def _mean_and_error(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    if len(values) < _LEAST_TASKS:
        return (float(values.mean()) if len(values) else 0.0), float("inf")
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def _described(row: MeasureRow) -> str:
    return (
        f"{row.measure}, gained {100 * row.gain:+.1f} points over the uniform bank, standard error "
        f"{100 * row.gain_error:.1f}, on {row.tasks} tasks"
    )
