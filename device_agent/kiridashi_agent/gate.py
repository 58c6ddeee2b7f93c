"""Whether a tuned model may replace the shipped one, judged on the device's hold-out. Pure.

Two conditions. Accuracy must not be lower. And no class may lose more recall than the policy allows, as far as the
hold-out can tell: the recall of a class with n samples has a standard error of at most ``1 / (2·√n)``, so a class may
lose the policy's share plus one such error, and one sample in any case. With a policy of 10 % that is one sample of 4,
two of 8, four of 20, and 15 of 100: the larger the hold-out, the closer to the policy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
    """Apply both conditions; the reason states the numbers, and how much loss the smallest class could hide.

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
    lost = {c: int(right_before[of].sum()) - int(right_after[of].sum()) for c, of in classes}
    counts = {c: int(of.sum()) for c, of in classes}
    drops = {c: lost[c] / counts[c] for c in counts}
    worst = max(drops, key=lambda c: drops[c])
    broken = [c for c in counts if lost[c] > allowed_loss(counts[c], max_recall_drop)]

    def verdict(kept: bool, reason: str) -> Judgement:
        return Judgement(kept, reason, accuracy_before, accuracy_after, max(0.0, drops[worst]))

    if accuracy_after < accuracy_before:
        return verdict(False, f"accuracy on the hold-out fell from {accuracy_before:.1%} to {accuracy_after:.1%}")
    if broken:
        c = max(broken, key=lambda c: drops[c])
        limit = math.floor(allowed_loss(counts[c], max_recall_drop))
        why = f"class '{names[c]}' lost {lost[c]} of its {counts[c]} hold-out samples, allowed is {limit}"
        return verdict(False, f"{why}; accuracy went from {accuracy_before:.1%} to {accuracy_after:.1%}")
    fewest = min(counts.values())
    hidden = math.floor(allowed_loss(fewest, max_recall_drop))
    return verdict(
        True,
        f"accuracy on the hold-out went from {accuracy_before:.1%} to {accuracy_after:.1%}, and no class lost more "
        f"than allowed ({hidden} of {fewest} samples for the smallest)",
    )


def allowed_loss(samples: int, max_recall_drop: float) -> float:
    """How many of its ``samples`` hold-out samples a class may lose; see the module's text."""
    return max(1.0, samples * max_recall_drop + math.sqrt(samples) / 2)
