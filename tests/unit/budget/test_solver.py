"""Solving a budget into a plan, on a small network with known costs."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kiridashi.budget import Budget
from kiridashi.errors import BudgetError
from kiridashi_server.budget import Profile, plan_cut
from kiridashi_server.graph.cost import CostModel
from kiridashi_server.graph.layout import Group, Layout, Member

SIZES = {"stem": 32, "body": 64, "tail": 48}
LAYOUT = Layout(tuple(Group(name, size, "filter", (Member(f"{name}.weight", 0),)) for name, size in SIZES.items()), ())
COSTS = CostModel(
    SIZES,
    parameter_terms=((27, ("stem",)), (9, ("body", "stem")), (1, ("body", "tail")), (10, ("tail",))),
    mac_terms=((27 * 256, ("stem",)), (9 * 64, ("body", "stem")), (64, ("body", "tail")), (10, ("tail",))),
)
PROFILE = Profile(
    runtime="onnxruntime",
    threads=1,
    hardware="real",
    machine="bench",
    points=(),
    memory=(1_000_000.0, 8.0),
    file=(2_000.0, 4.0),
    latency=(0.01, 1e-6, 1e-6),
    tail=1.2,
    error=(0.0, 0.0, 0.0),
)


def random_scores(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.gamma(1.0, size=size).astype(np.float32) for name, size in SIZES.items()}


def dense_needs() -> tuple[float, float, float]:
    dense = PROFILE.forecast(COSTS.parameters({}), COSTS.macs({}))
    return dense.memory_bytes, dense.file_bytes, dense.latency_p95_ms


@given(
    seed=st.integers(0, 200),
    shares=st.tuples(st.floats(0.93, 1.1), st.floats(0.3, 1.1), st.floats(0.3, 1.1)),
)
@settings(max_examples=60, deadline=None)
def test_every_plan_is_inside_every_limit_and_nearly_fills_one(seed: int, shares: tuple[float, float, float]) -> None:
    memory, file, latency = (need * share for need, share in zip(dense_needs(), shares, strict=True))
    budget = Budget(int(memory), int(file), latency)
    solution = plan_cut(LAYOUT, COSTS, random_scores(seed), budget, PROFILE)
    assert max(solution.used.values()) <= 1.0
    assert solution.parameters == COSTS.parameters({name: len(units) for name, units in solution.plan.kept.items()})
    if solution.binding is None:
        assert solution.parameters == COSTS.parameters({})
    else:
        assert max(solution.used.values()) > 0.7


def test_the_best_units_of_every_group_stay() -> None:
    scores = random_scores(3)
    solution = plan_cut(LAYOUT, COSTS, scores, Budget(file_bytes=int(dense_needs()[1] * 0.4)), PROFILE)
    for name, kept in solution.plan.kept.items():
        best = set(np.argsort(-scores[name], kind="stable")[: len(kept)].tolist())
        assert set(kept) == best
        assert len(kept) % 8 == 0


def test_importance_is_close_to_the_exact_optimum() -> None:
    scores = random_scores(5)
    ranked = {name: np.sort(values)[::-1].cumsum() for name, values in scores.items()}
    limit = dense_needs()[1] * 0.5
    widths = {name: range(8, size + 1, 8) for name, size in SIZES.items()}
    exact = max(
        sum(float(ranked[name][width - 1]) for name, width in zip(SIZES, combination, strict=True))
        for combination in product(*widths.values())
        if PROFILE.forecast(COSTS.parameters(dict(zip(SIZES, combination, strict=True))), 0).file_bytes <= limit
    )
    solution = plan_cut(LAYOUT, COSTS, scores, Budget(file_bytes=int(limit)), PROFILE)
    kept = sum(float(scores[name][list(units)].sum()) for name, units in solution.plan.kept.items())
    assert kept >= 0.9 * exact


def test_an_impossible_budget_names_the_limit_and_the_smallest_feasible() -> None:
    with pytest.raises(BudgetError) as caught:
        plan_cut(LAYOUT, COSTS, random_scores(0), Budget(memory_bytes=10_000_000, file_bytes=100), PROFILE)
    assert "file" in caught.value.why
    assert "memory and" not in caught.value.why
    smallest = Budget.parse(caught.value.next_step.removeprefix("ask for at least ").partition(", or ")[0])
    assert plan_cut(LAYOUT, COSTS, random_scores(0), smallest, PROFILE).parameters < COSTS.parameters({})


def test_the_profile_error_is_kept_as_a_margin() -> None:
    budget = Budget(file_bytes=int(dense_needs()[1] * 0.5))
    uncertain = Profile(
        **{field: getattr(PROFILE, field) for field in PROFILE.__struct_fields__} | {"error": (0, 0.08, 0)}
    )
    careful = plan_cut(LAYOUT, COSTS, random_scores(1), budget, uncertain)
    assert careful.used["file"] <= 0.92
