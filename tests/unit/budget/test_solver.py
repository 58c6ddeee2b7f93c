"""Solving a budget into a plan, on a small network with known costs."""

from itertools import product

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kiridashi.budget import Budget
from kiridashi.errors import BudgetError, InputError
from kiridashi_server.budget import Profile, plan_cut, plan_size
from kiridashi_server.budget.problem import evaluate
from kiridashi_server.budget.requirements import requirements
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
@settings(max_examples=30, deadline=None)
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


def test_importance_is_that_of_the_exact_optimum() -> None:
    scores = random_scores(5)
    ranked = {name: np.sort(values.astype(np.float64) ** 2)[::-1].cumsum() for name, values in scores.items()}
    limit = dense_needs()[1] * 0.5
    widths = {name: range(8, size + 1, 8) for name, size in SIZES.items()}
    exact = max(
        sum(float(ranked[name][width - 1]) for name, width in zip(SIZES, combination, strict=True))
        for combination in product(*widths.values())
        if PROFILE.forecast(COSTS.parameters(dict(zip(SIZES, combination, strict=True))), 0).file_bytes <= limit
    )
    exact /= sum(float(values[-1]) for values in ranked.values())
    solution = plan_cut(LAYOUT, COSTS, scores, Budget(file_bytes=int(limit)), PROFILE)
    assert solution.importance <= exact * (1 + 1e-9) <= solution.importance * (1 + solution.gap) * (1 + 2e-9)
    assert solution.gap <= 1e-4


def test_without_limits_the_dense_model_stays() -> None:
    solution = plan_cut(LAYOUT, COSTS, random_scores(0), Budget(), PROFILE)
    assert solution.plan.counts == SIZES
    assert (solution.binding, solution.importance, solution.gap, solution.used) == (None, 1.0, 0.0, {})


@pytest.mark.parametrize(
    ("budget", "short"),
    [
        (Budget(memory_bytes=10_000_000, file_bytes=100), "file"),
        (Budget(memory_bytes=900_000, file_bytes=100), "memory and file"),
        (Budget(memory_bytes=10_000_001, latency_p95_ms=0.0123), "latency"),
        (Budget.parse("memory=0.9MiB,file=9KiB,latency=0.2ms"), "memory"),
    ],
)
@pytest.mark.parametrize("error", [0.0, 0.07])
def test_an_impossible_budget_names_its_limits_and_the_nearest_feasible_one(
    budget: Budget, short: str, error: float
) -> None:
    profile = msgspec.structs.replace(PROFILE, error=(error,) * 3)
    with pytest.raises(BudgetError) as caught:
        plan_cut(LAYOUT, COSTS, random_scores(0), budget, profile)
    assert f"the binding limit is {short}:" in caught.value.why
    nearest = Budget.parse(caught.value.next_step.removeprefix("ask for at least ").partition(", or ")[0])
    for name in ("memory_bytes", "file_bytes", "latency_p95_ms"):
        asked, answered = getattr(budget, name), getattr(nearest, name)
        if name.partition("_")[0] in short:
            assert answered > asked
        else:
            assert answered == asked
    assert plan_cut(LAYOUT, COSTS, random_scores(0), nearest, profile).parameters < COSTS.parameters({})
    assert max(plan_cut(LAYOUT, COSTS, random_scores(0), nearest, profile).used.values()) > 0.9


@given(st.tuples(*(st.integers(1, size) for size in SIZES.values())))
def test_requirements_are_what_the_profile_forecasts(widths: tuple[int, ...]) -> None:
    kept = dict(zip(SIZES, widths, strict=True))
    forecast = PROFILE.forecast(COSTS.parameters(kept), COSTS.macs(kept))
    needs = {name: evaluate(terms, kept) for name, (terms,) in requirements(PROFILE, COSTS).items()}
    expected = {"memory": forecast.memory_bytes, "file": forecast.file_bytes, "latency": forecast.latency_p95_ms}
    assert needs == pytest.approx(expected)


def test_a_size_is_filled_with_the_most_valuable_units() -> None:
    scores = random_scores(2)
    plan = plan_size(LAYOUT, COSTS, scores, COSTS.parameters({}) // 2)
    budget = Budget(file_bytes=int(2_000 + 4 * (COSTS.parameters({}) // 2)))
    assert plan == plan_cut(LAYOUT, COSTS, scores, budget, PROFILE).plan
    with pytest.raises(BudgetError, match="at most 100 parameters"):
        plan_size(LAYOUT, COSTS, scores, 100)


def test_scores_that_say_nothing_are_refused() -> None:
    zeros = {name: np.zeros(size, dtype=np.float32) for name, size in SIZES.items()}
    with pytest.raises(InputError, match="all scores are zero"):
        plan_size(LAYOUT, COSTS, zeros, 10_000)
    with pytest.raises(InputError, match="'body' are below zero"):
        plan_size(LAYOUT, COSTS, random_scores(0) | {"body": -np.ones(64, dtype=np.float32)}, 10_000)


def test_the_profile_error_is_kept_as_a_margin() -> None:
    budget = Budget(file_bytes=int(dense_needs()[1] * 0.5))
    uncertain = msgspec.structs.replace(PROFILE, error=(0, 0.08, 0))
    careful = plan_cut(LAYOUT, COSTS, random_scores(1), budget, uncertain)
    assert careful.used["file"] <= 0.92
