"""Solving a budget into a plan, on a small network with known costs."""

from itertools import product

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kiridashi.budget import Budget
from kiridashi.errors import BudgetError, InputError
from kiridashi_server.budget import Profile, plan_cut, plan_size
from kiridashi_server.budget.profile import Forecast
from kiridashi_server.budget.requirements import LIMITS, Requirements
from kiridashi_server.budget.solver import SMALLEST_MARGIN
from kiridashi_server.graph import capture, track
from kiridashi_server.graph.quantities import Quantities
from torch import nn

NETWORK = nn.Sequential(
    nn.Conv2d(3, 32, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(32, 64, 3, stride=2, padding=1),
    nn.ReLU(),
    nn.Conv2d(64, 48, 1),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
)
PROGRAM = capture(NETWORK, torch.zeros(1, 3, 16, 16))
QUANTITIES = Quantities.of(PROGRAM, track(PROGRAM, cuttable_output=True))
LAYOUT, COSTS = QUANTITIES.layout, QUANTITIES.costs
SIZES = dict(LAYOUT.sizes)
PROFILE = Profile(
    device_class="bench",
    hardware="real",
    runtime_name="onnxruntime",
    runtime="onnxruntime 1",
    threads=1,
    backbone_fingerprint="",
    layout_digest=LAYOUT.digest,
    macs=COSTS.macs({}),
    points=(),
    block=8,
    multiple=8,
    block_errors={},
    cliffs={},
    memory={"fixed": 1_000_000.0, "parameters": 8.0, "activations": 4.0},
    file={"fixed": 2_000.0, "parameters": 4.0},
    latency={"fixed": 0.01, "dense": 1e-6, "weights": 1e-6},
    tail=1.2,
    noise=0.0,
    error={"memory": 0.0, "file": 0.0, "latency": 0.0},
)


def random_scores(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.gamma(1.0, size=size).astype(np.float32) for name, size in SIZES.items()}


def forecast(widths: dict[str, int]) -> Forecast:
    return Requirements.of(PROFILE, QUANTITIES).forecast(widths)


def dense_needs() -> tuple[float, float, float]:
    dense = forecast({})
    return dense.memory_bytes, dense.file_bytes, dense.latency_p95_ms


@given(
    seed=st.integers(0, 200),
    shares=st.tuples(st.floats(0.93, 1.1), st.floats(0.3, 1.1), st.floats(0.3, 1.1)),
)
@settings(max_examples=30, deadline=None)
def test_every_plan_is_inside_every_limit_and_nearly_fills_one(seed: int, shares: tuple[float, float, float]) -> None:
    memory, file, latency = (need * share for need, share in zip(dense_needs(), shares, strict=True))
    budget = Budget(int(memory), int(file), latency)
    solution = plan_cut(QUANTITIES, random_scores(seed), budget, PROFILE)
    assert max(solution.used.values()) <= 1.0
    assert solution.parameters == COSTS.parameters({name: len(units) for name, units in solution.plan.kept.items()})
    if solution.binding is None:
        assert solution.parameters == COSTS.parameters({})
    else:
        assert max(solution.used.values()) > 0.7


def test_the_best_units_of_every_group_stay() -> None:
    scores = random_scores(3)
    solution = plan_cut(QUANTITIES, scores, Budget(file_bytes=int(dense_needs()[1] * 0.4)), PROFILE)
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
        if forecast(dict(zip(SIZES, combination, strict=True))).file_bytes <= limit
    )
    exact /= sum(float(values[-1]) for values in ranked.values())
    solution = plan_cut(QUANTITIES, scores, Budget(file_bytes=int(limit)), PROFILE)
    assert solution.importance <= exact * (1 + 1e-9) <= solution.importance * (1 + solution.gap) * (1 + 2e-9)
    assert solution.gap <= 1e-4


def test_without_limits_the_dense_model_stays() -> None:
    solution = plan_cut(QUANTITIES, random_scores(0), Budget(), PROFILE)
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
    profile = msgspec.structs.replace(PROFILE, error=dict.fromkeys(LIMITS, error))
    with pytest.raises(BudgetError) as caught:
        plan_cut(QUANTITIES, random_scores(0), budget, profile)
    assert f"the binding limit is {short}:" in caught.value.why
    nearest = Budget.parse(caught.value.next_step.removeprefix("ask for at least ").partition(", or ")[0])
    for name in ("memory_bytes", "file_bytes", "latency_p95_ms"):
        asked, answered = getattr(budget, name), getattr(nearest, name)
        if name.partition("_")[0] in short:
            assert answered > asked
        else:
            assert answered == asked
    assert plan_cut(QUANTITIES, random_scores(0), nearest, profile).parameters < COSTS.parameters({})
    assert max(plan_cut(QUANTITIES, random_scores(0), nearest, profile).used.values()) > 0.9


@given(st.tuples(*(st.integers(1, size) for size in SIZES.values())))
def test_a_forecast_adds_up_parameters_activations_and_work(widths: tuple[int, ...]) -> None:
    stem, body, tail = widths
    kept = dict(zip(SIZES, widths, strict=True))
    found = forecast(kept)
    filled = [-(-width // 8) * 8 for width in widths]
    dense = 256 * 27 * filled[0] + 64 * 9 * stem * filled[1] + 64 * body * filled[2]
    parameters = 28 * stem + (9 * stem + 1) * body + (body + 1) * tail
    alive = max(768 + 256 * stem, 512 * stem, 256 * stem + 64 * body, 128 * body, 64 * (body + tail))
    assert COSTS.parameters(kept) == parameters
    assert found.file_bytes == pytest.approx(2_000 + 4 * parameters)
    assert found.latency_p95_ms == pytest.approx(1.2 * (0.01 + 1e-6 * dense + 1e-6 * parameters))
    assert 1e6 + 8 * parameters < found.memory_bytes <= 1e6 + 8 * parameters + 4 * alive + 1


def test_a_profile_of_another_input_size_is_refused() -> None:
    other = msgspec.structs.replace(PROFILE, macs=PROFILE.macs * 4)
    with pytest.raises(InputError, match="another input size"):
        plan_cut(QUANTITIES, random_scores(0), Budget(), other)


@pytest.mark.parametrize("ragged", [1e-7, 1e-6, 5e-6])
@pytest.mark.parametrize("seed", range(5))
def test_no_ragged_width_stays_where_the_full_block_is_cheaper_and_worth_more(ragged: float, seed: int) -> None:
    """Widths are multiples of 8 and the kernels' blocks 16: half of the widths to choose from are ragged."""
    prices = {"fixed": 0.01, "dense": 1e-6, "dense-ragged": ragged}
    slow = msgspec.structs.replace(PROFILE, block=16, multiple=8, latency=prices)
    requirements = Requirements.of(slow, QUANTITIES)
    for share in (0.3, 0.5, 0.65, 0.8):
        limit = share * requirements.expected("latency", {})
        solution = plan_cut(QUANTITIES, random_scores(seed), Budget(latency_p95_ms=limit), slow)
        counts = dict(solution.plan.counts)
        needed = requirements.expected("latency", counts)
        assert needed <= 0.97 * limit
        assert solution.used["latency"] == pytest.approx(needed / limit)
        for name, width in counts.items():
            if width % 16:
                assert requirements.expected("latency", {**counts, name: width + 8}) > needed


def test_the_nearest_budget_can_be_kept_where_the_smallest_cut_is_ragged() -> None:
    prices = {"fixed": 0.01, "dense": 1e-6, "dense-ragged": 1e-6}
    slow = msgspec.structs.replace(PROFILE, block=16, multiple=8, latency=prices)
    smallest = Requirements.of(slow, QUANTITIES).expected("latency", dict.fromkeys(SIZES, 8))
    with pytest.raises(BudgetError) as caught:
        plan_cut(QUANTITIES, random_scores(0), Budget(latency_p95_ms=0.9 * smallest), slow)
    nearest = Budget.parse(caught.value.next_step.removeprefix("ask for at least ").partition(", or ")[0])
    assert nearest.latency_p95_ms is not None
    least = 1 - SMALLEST_MARGIN["latency"]
    assert nearest.latency_p95_ms == pytest.approx(smallest / least, rel=0.01)
    assert plan_cut(QUANTITIES, random_scores(0), nearest, slow).used["latency"] <= least


def test_a_size_is_filled_with_the_most_valuable_units() -> None:
    scores = random_scores(2)
    plan = plan_size(LAYOUT, COSTS, scores, COSTS.parameters({}) // 2)
    budget = Budget(file_bytes=int(2_000 + 4 * (COSTS.parameters({}) // 2)))
    assert plan == plan_cut(QUANTITIES, scores, budget, PROFILE).plan
    with pytest.raises(BudgetError, match="at most 100 parameters"):
        plan_size(LAYOUT, COSTS, scores, 100)


def test_scores_that_say_nothing_are_refused() -> None:
    zeros = {name: np.zeros(size, dtype=np.float32) for name, size in SIZES.items()}
    with pytest.raises(InputError, match="all scores are zero"):
        plan_size(LAYOUT, COSTS, zeros, 10_000)
    with pytest.raises(InputError, match="'2' are below zero"):
        plan_size(LAYOUT, COSTS, random_scores(0) | {"2": -np.ones(64, dtype=np.float32)}, 10_000)


def test_the_profile_error_is_kept_as_a_margin() -> None:
    budget = Budget(file_bytes=int(dense_needs()[1] * 0.5))
    uncertain = msgspec.structs.replace(PROFILE, error={**PROFILE.error, "file": 0.08})
    careful = plan_cut(QUANTITIES, random_scores(1), budget, uncertain)
    assert careful.used["file"] <= 0.92
