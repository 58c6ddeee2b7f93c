"""Are budgets kept? Random budgets, solved, cut, measured by the device's agent, corrected at most once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from kiridashi.budget import Budget, Limit, Measurement
from kiridashi.errors import BudgetError
from kiridashi_server.amp.scores import ScoreMap
from kiridashi_server.backbone import Backbone
from kiridashi_server.budget.candidates import candidates
from kiridashi_server.budget.profile import Profile
from kiridashi_server.budget.requirements import LIMITS, Requirements
from kiridashi_server.pipeline import fit_to_budget

_SHARES = (0.15, 0.9)


def keep_budgets(backbone: Backbone, profile: Profile, folder: Path, *, count: int, seed: int) -> list[dict[str, Any]]:
    """Solve random budgets of one, two or three limits and measure what comes of them.

    Every limit lies at a random share of the way from the smallest cut's forecast to the dense model's; scores are
    random too, for a budget has to hold whatever is asked for.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        scores = _random_scores(backbone, rng)
        budget = _random_budget(backbone, profile, scores, rng)
        place = folder / f"budget-{number:02d}"
        place.mkdir(parents=True, exist_ok=True)
        rows.append({"budget": str(budget), **_kept(backbone, profile, scores, budget, place)})
    return rows


def _kept(backbone: Backbone, profile: Profile, scores: ScoreMap, budget: Budget, folder: Path) -> dict[str, Any]:
    try:
        fitted = fit_to_budget(backbone, scores, budget, profile, folder)
    except BudgetError as error:
        return {"live": False, "first_try": False, "corrections": 1, "use": None, "why": str(error)}
    used = _used(budget, fitted.measured)
    binding = max(used, key=used.__getitem__)
    return {
        "live": True,
        "first_try": fitted.corrections == 0,
        "corrections": fitted.corrections,
        "use": used[binding],
        "binding": binding,
        "used": used,
        "forecast_error": {
            "memory": fitted.solution.forecast.memory_bytes / fitted.measured.memory_bytes - 1,
            "file": fitted.solution.forecast.file_bytes / fitted.measured.file_bytes - 1,
            "latency": fitted.solution.forecast.latency_p95_ms / fitted.measured.latency_p95_ms - 1,
        },
        "gap": fitted.solution.gap,
        "notes": fitted.measured.notes,
    }


def _used(budget: Budget, measured: Measurement) -> dict[Limit, float]:
    pairs: Mapping[Limit, tuple[float | None, float]] = {
        "memory": (budget.memory_bytes, measured.memory_bytes),
        "file": (budget.file_bytes, measured.file_bytes),
        "latency": (budget.latency_p95_ms, measured.latency_p95_ms),
    }
    return {name: value / limit for name, (limit, value) in pairs.items() if limit is not None}


def _random_scores(backbone: Backbone, rng: np.random.Generator) -> dict[str, Any]:
    return {
        group.name: (rng.gamma(1.0, size=group.size) * rng.gamma(2.0)).astype(np.float32)
        for group in backbone.layout.groups
    }


def _random_budget(backbone: Backbone, profile: Profile, scores: ScoreMap, rng: np.random.Generator) -> Budget:
    needs = Requirements.of(profile, backbone.quantities)
    narrowest = candidates(backbone.layout, scores, multiple=profile.multiple).narrowest
    chosen = rng.permutation(LIMITS)[: rng.integers(1, 4)]
    values: dict[str, float] = {}
    for limit in LIMITS:
        low, high = needs.expected(limit, narrowest), needs.expected(limit, {})
        value = low + float(rng.uniform(*_SHARES)) * (high - low)
        if limit in chosen:
            values[limit] = value
    return Budget(
        memory_bytes=int(values["memory"]) if "memory" in values else None,
        file_bytes=int(values["file"]) if "file" in values else None,
        latency_p95_ms=values.get("latency"),
    )
