"""From scores to a plan that keeps a wanted number of parameters."""

from __future__ import annotations

import numpy as np
from kiridashi.errors import InputError

from kiridashi_server.amp.scores import ScoreMap, check_scores
from kiridashi_server.compose.ladder import build_ladder
from kiridashi_server.graph.cost import CostModel
from kiridashi_server.graph.layout import Layout
from kiridashi_server.graph.plan import Plan

DEFAULT_MULTIPLE = 8
DEFAULT_FLOOR = 0.05


def steps_for(scores: ScoreMap, layout: Layout, multiple: int = DEFAULT_MULTIPLE) -> dict[str, int]:
    """In what steps each scored group may be narrowed: the multiple, and heads one by one.

    A group with no more units than the multiple stays whole: fewer would not be faster.

    Raises:
        InputError: scores do not fit the layout, or the multiple is below 1.
    """
    if multiple < 1:
        raise InputError(f"the channel multiple is at least 1, got {multiple}")
    check_scores(scores, layout.sizes)
    return {group.name: 1 if group.kind == "head" else multiple for group in layout.groups if group.name in scores}


def select(
    scores: ScoreMap,
    layout: Layout,
    costs: CostModel,
    keep_parameters: int | float,
    *,
    multiple: int = DEFAULT_MULTIPLE,
    floor: float = DEFAULT_FLOOR,
) -> Plan:
    """The largest cut that keeps at most ``keep_parameters``, units leaving in the order of their scores.

    Scores are not divided by what a unit costs: at 30 and 15 % of EfficientNet-Lite0's parameters that kept more
    computation and yet lost accuracy.

    Args:
        scores: by group, float32 [size]; groups that are left out stay whole.
        layout: the backbone's.
        costs: its cost model.
        keep_parameters: an int counts parameters of the feature extractor; a float is a share of the dense one's.
        multiple: widths are multiples of this; attention heads go one by one.
        floor: the least share of each group that stays.

    Raises:
        InputError: scores do not fit the layout, or a share is not in (0, 1].
        BudgetError: the floors leave more than that.
    """
    if isinstance(keep_parameters, float) and not 0 < keep_parameters <= 1:
        raise InputError(f"the share to keep is above 0 and at most 1, got {keep_parameters}")
    limit = keep_parameters if isinstance(keep_parameters, int) else keep_parameters * costs.parameters({})
    ladder = build_ladder(scores, steps_for(scores, layout, multiple), floor=floor)
    kept = ladder.kept(ladder.first_within(costs.parameters, limit))
    return Plan.of(layout, {name: np.asarray(units).tolist() for name, units in kept.items()})
