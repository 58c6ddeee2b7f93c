"""Whether a tuned model may replace the shipped one, judged on the device's hold-out. Pure.

Two conditions. Accuracy must not be lower. And no class may lose more recall than the policy allows, as far as the
hold-out can tell: a class is refused when it lost more than the policy's share of its samples *and* the loss is more
than chance explains. Chance is the exact one-sided test of McNemar (1947) on the samples whose verdict changed: of
those that went wrong or right, would so many have gone wrong if either were equally likely? Below 5 % it is no chance.
With four hold-out samples of a class no loss can be told from chance, with eight it takes five, and with a hundred
the policy itself decides nearly always; so a class that matters needs hold-out samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Judgement:
    """The comparison on the hold-out; ``reason`` says in words why the model is kept or not."""

    kept: bool
    reason: str
    accuracy_before: float
    accuracy_after: float
    worst_recall_drop: float


def judge_tuning(
    labels: NDArray[np.int64],
    before: NDArray[np.int64],
    after: NDArray[np.int64],
    names: Sequence[str],
    max_recall_drop: float,
) -> Judgement:
    """Apply both conditions; the reason states the numbers.

    Args:
        labels: true classes of the hold-out, int64 [n], n >= 1.
        before: classes predicted by the shipped model.
        after: classes predicted by the tuned model.
        names: the class names.
        max_recall_drop: a share of 1.
    """
    right_before, right_after = before == labels, after == labels
    accuracy_before, accuracy_after = float(right_before.mean()), float(right_after.mean())
    classes = [(int(c), labels == c) for c in np.unique(labels)]
    wrong = {c: int((right_before & ~right_after)[of].sum()) for c, of in classes}
    mended = {c: int((~right_before & right_after)[of].sum()) for c, of in classes}
    lost = {c: wrong[c] - mended[c] for c, _ in classes}
    counts = {c: int(of.sum()) for c, of in classes}
    drops = {c: lost[c] / counts[c] for c in counts}
    worst = max(drops, key=lambda c: drops[c])
    broken = [c for c in counts if drops[c] > max_recall_drop and chance_of_loss(wrong[c], mended[c]) < SIGNIFICANCE]

    def verdict(kept: bool, reason: str) -> Judgement:
        return Judgement(kept, reason, accuracy_before, accuracy_after, max(0.0, drops[worst]))

    if accuracy_after < accuracy_before:
        return verdict(False, f"accuracy on the hold-out fell from {accuracy_before:.1%} to {accuracy_after:.1%}")
    if broken:
        c = max(broken, key=lambda c: drops[c])
        chance = chance_of_loss(wrong[c], mended[c])
        why = (
            f"class '{names[c]}' lost {lost[c]} of its {counts[c]} hold-out samples, more than the "
            f"{max_recall_drop:.0%} of the policy and than chance explains (p = {chance:.2g})"
        )
        return verdict(False, f"{why}; accuracy went from {accuracy_before:.1%} to {accuracy_after:.1%}")
    return verdict(
        True,
        f"accuracy on the hold-out went from {accuracy_before:.1%} to {accuracy_after:.1%}, and no class lost more "
        f"than {max_recall_drop:.0%} of its recall that chance would not explain",
    )


def chance_of_loss(wrong: int, mended: int) -> float:
    """Probability that at least ``wrong`` of ``wrong + mended`` changed verdicts went wrong by chance alone."""
    changed = wrong + mended
    tail = sum(math.comb(changed, k) for k in range(wrong, changed + 1))
    return tail / float(2**changed)


def smallest_refused_loss(count: int, max_recall_drop: float) -> int | None:
    """How many of a class's ``count`` hold-out samples have to be lost, and none mended, for the gate to refuse.

    ``None`` if it never does: the class is not protected.
    """
    losses = (lost for lost in range(1, count + 1) if lost / count > max_recall_drop)
    return next((lost for lost in losses if chance_of_loss(lost, 0) < SIGNIFICANCE), None)
