"""Is reuse justified? Split conformal bounds on what the bank gains a new task, from tasks that played new.

The gain G is the accuracy of the cut by the bank's plain mean less that of the cut by the task's own few-shot scores.
A predictor ``g(q)`` of the gain from the statistics q of the few samples is fitted on one part of the assessed tasks.
On the others, the calibration tasks, ``a_t = g(q_t) - G_t`` says how much worse than foretold it went. With n of them
and

    Q = the k-th smallest of a_1 ... a_n,    k = ceil((n + 1)(1 - alpha)),

``G >= g(q) - Q`` holds for a new task with probability at least ``1 - alpha``, for any predictor and any distribution,
as long as the new task and the calibration tasks are exchangeable (Vovk et al. 2005; for few-shot tasks Fisch et al.
2021, arXiv 2102.08898). The upper bound is the same with the sign turned. Each bound has its own ``1 - alpha``; both
at once hold with at least ``1 - 2 alpha``. With fewer than ``1/alpha - 1`` calibration tasks k exceeds n, and there is
no bound.

Each verdict rests on one bound. ``reuse``: by the lower one, the bank loses no more than the margin. ``fallback``: by
the upper one, it loses. ``blend``: neither. So at most alpha of all new tasks are told ``reuse`` and lose more; among
those that are told so, the share may be larger.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from kiridashi.errors import InputError

from kiridashi_server.similarity.evidence import VerdictName

FloatArray = npt.NDArray[np.float64]

_FIT_FROM = 6  # below so many tasks to fit on, the predictor is the constant 0
_ROUNDING = 1e-9


@dataclass(frozen=True)
class VerdictSettings:
    """How sure a verdict has to be.

    Attributes:
        alpha: the chance that a bound may fail.
        margin: accuracy that reuse may cost, against the seconds of learning own scores.
    """

    alpha: float = 0.1
    margin: float = 0.02

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 0.5 or self.margin < 0:
            raise InputError(
                f"verdict settings are out of range: {self}", why="alpha is in (0, 0.5), the margin at least 0"
            )


DEFAULT_SETTINGS = VerdictSettings()


@dataclass(frozen=True, eq=False)
class Calibration:
    """Bounds for new tasks, made by :func:`calibrate_gains`.

    Attributes:
        centre, slope: the predictor, ``offset + (q - centre) @ slope``; float64 [statistics].
        offset: its value at the centre.
        below: Q of the lower bound; infinite where there are too few tasks.
        above: Q of the upper bound.
        tasks: how many tasks calibrated it.
    """

    centre: FloatArray
    slope: FloatArray
    offset: float
    below: float
    above: float
    tasks: int


@dataclass(frozen=True)
class Verdict:
    """The verdict, the foretold gain in accuracy with both bounds, and the reason in words."""

    name: VerdictName
    expected: float
    lower: float
    upper: float
    reason: str


@dataclass(frozen=True)
class Coverage:
    """How often bounds held for tasks that had no part in them, over random splits of the assessed tasks.

    Attributes:
        splits: how many.
        calibration: tasks that each split's bounds were made from, fitting included.
        lower, upper, both: shares of held-out tasks whose gain kept the bound.
        width: mean distance of the bounds, in accuracy.
        verdicts: share of each verdict.
        kept: share of ``reuse`` verdicts whose gain was within the margin; 1 where there are none.
    """

    splits: int
    calibration: int
    lower: float
    upper: float
    both: float
    width: float
    verdicts: dict[str, float]
    kept: float


def tasks_needed(alpha: float) -> int:
    """The fewest calibration tasks with a finite bound: ``ceil(1 / alpha) - 1``."""
    return math.ceil(1 / alpha - _ROUNDING) - 1


def calibrate(residuals: FloatArray, alpha: float) -> FloatArray:
    """Q, the ``ceil((n + 1)(1 - alpha))``-th smallest residual; infinite if that exceeds n.

    Args:
        residuals: float64 [..., n], exchangeable along the last axis.
        alpha: the chance that a new residual may exceed Q.
    """
    count = residuals.shape[-1]
    rank = math.ceil((count + 1) * (1 - alpha) - _ROUNDING)
    if rank > count:
        return np.full(residuals.shape[:-1], np.inf)
    return np.partition(residuals, rank - 1, axis=-1)[..., rank - 1]


def calibrate_gains(gains: FloatArray, statistics: FloatArray, settings: VerdictSettings) -> Calibration:
    """Fit on the first tasks (:func:`tasks_to_fit`), calibrate on the others.

    Args:
        gains: float64 [tasks], in an order that does not depend on them.
        statistics: float64 [tasks, p].
        settings: alpha.
    """
    fit = tasks_to_fit(len(gains), settings.alpha)
    centre, slope, offset = _fit(gains[None, :fit], statistics[None, :fit])
    residuals = _predict(centre, slope, offset, statistics[None, fit:])[0] - gains[fit:]
    below, above = calibrate(residuals, settings.alpha), calibrate(-residuals, settings.alpha)
    return Calibration(centre[0], slope[0], float(offset[0]), float(below), float(above), len(residuals))


def verdict(calibration: Calibration, statistics: FloatArray, settings: VerdictSettings) -> Verdict:
    """The verdict on a new task.

    Args:
        calibration: of the bank's assessed tasks, with the same alpha.
        statistics: the new task's, float64 [p].
        settings: alpha and margin.
    """
    expected = calibration.offset + float((statistics - calibration.centre) @ calibration.slope)
    lower, upper = expected - calibration.below, expected + calibration.above
    number = int(_verdicts(np.array(lower), np.array(upper), settings.margin))
    name = _NAMES[number]
    bounds = f"between {100 * lower:+.1f} and {100 * upper:+.1f} points" if calibration.below < np.inf else "unknown"
    sure = f"{1 - settings.alpha:.0%} sure by {calibration.tasks} tasks that played new"
    reason = {
        "reuse": f"the bank's scores cost at most {100 * settings.margin:.1f} points against the task's own",
        "fallback": "the task's own scores do better than the bank's",
        "blend": "the bank may gain or lose against the task's own scores",
    }[name]
    return Verdict(name, expected, lower, upper, f"{reason}: their gain is {bounds} (each {sure})")


def coverage(
    gains: FloatArray, statistics: FloatArray, settings: VerdictSettings, *, splits: int = 500, seed: int = 0
) -> Coverage:
    """Make bounds from one half of the tasks, or from the fewest that are needed, and try them on the others.

    Args:
        gains: float64 [tasks].
        statistics: float64 [tasks, p].
        settings: alpha and margin.
        splits: how many random splits.
        seed: of the splits.

    Raises:
        InputError: too few tasks to calibrate on some and try on others.
    """
    count, needed = len(gains), tasks_needed(settings.alpha)
    if count < needed + 1:
        raise InputError(
            f"coverage needs at least {needed + 1} assessed tasks",
            why=f"there are {count}; {needed} calibrate, and one is tried",
            next_step="assess more of the bank's tasks: kiridashi bank assess --task TASK",
        )
    used = max(needed, count // 2)
    fit = tasks_to_fit(used, settings.alpha)
    order = np.random.default_rng(seed).permuted(np.tile(np.arange(count), (splits, 1)), axis=1)
    outcomes, known = gains[order], statistics[order]
    predicted = _predict(*_fit(outcomes[:, :fit], known[:, :fit]), known)
    residuals = (predicted - outcomes)[:, fit:used]
    lower = predicted[:, used:] - calibrate(residuals, settings.alpha)[:, None]
    upper = predicted[:, used:] + calibrate(-residuals, settings.alpha)[:, None]
    tried = outcomes[:, used:]
    above, beneath = tried >= lower - _ROUNDING, tried <= upper + _ROUNDING
    names = _verdicts(lower, upper, settings.margin)
    reused = tried[names == _NAMES.index("reuse")]
    return Coverage(
        splits=splits,
        calibration=used,
        lower=float(above.mean()),
        upper=float(beneath.mean()),
        both=float((above & beneath).mean()),
        width=float((upper - lower).mean()),
        verdicts={name: float((names == number).mean()) for number, name in enumerate(_NAMES)},
        kept=float((reused >= -settings.margin - _ROUNDING).mean()) if len(reused) else 1.0,
    )


def tasks_to_fit(count: int, alpha: float) -> int:
    """How many of ``count`` tasks the predictor is fitted on: a third, or none where that would be too few."""
    third = count // 3
    return third if third >= _FIT_FROM and count - third >= tasks_needed(alpha) else 0


_NAMES: tuple[VerdictName, ...] = ("blend", "reuse", "fallback")


def _verdicts(lower: FloatArray, upper: FloatArray, margin: float) -> npt.NDArray[np.int64]:
    """Numbers of verdicts in :data:`_NAMES`."""
    return np.where(lower >= -margin, 1, np.where(upper < 0, 2, 0))


def _fit(gains: FloatArray, statistics: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Ridge regression in every split: centres [S, p], slopes [S, p], offsets [S]; of no tasks, all zero.

    Statistics are standardised; the strength is the number of tasks, which halves the slope of a lone statistic.
    """
    splits, count, width = statistics.shape
    if count == 0:
        return np.zeros((splits, width)), np.zeros((splits, width)), np.zeros(splits)
    centre, offset = statistics.mean(axis=1), gains.mean(axis=1)
    spread = statistics.std(axis=1)
    spread = np.where(spread > 0, spread, 1.0)
    Z = (statistics - centre[:, None]) / spread[:, None]
    right = np.einsum("snp,sn->sp", Z, gains - offset[:, None])
    slope = np.linalg.solve(np.einsum("snp,snq->spq", Z, Z) + count * np.eye(width), right[..., None])[..., 0]
    return centre, slope / spread, offset


def _predict(centre: FloatArray, slope: FloatArray, offset: FloatArray, statistics: FloatArray) -> FloatArray:
    """Predicted gains [S, n] for statistics [S, n, p]."""
    result: FloatArray = offset[:, None] + np.einsum("snp,sp->sn", statistics - centre[:, None], slope)
    return result
