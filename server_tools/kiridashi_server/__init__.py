"""Kiridashi's server tools: scores, bank, composition, budget, cut, export, fleet.

The names below are loaded on first use, because torch takes seconds to import::

    import kiridashi_server as ks

    backbone = ks.Backbone.load("efficientnet-lite0")
    task = ks.load_task("photos/")
    with ks.Bank.open("bank") as bank:
        bank.add(ks.learn_record(backbone, task))
        evidence, mix = ks.compose_scores(backbone, bank.list(), samples, len(task.labels), seed=0)
    solution = ks.plan_cut(backbone.quantities, mix.scores, budget, profile)
    small = ks.recover_cut(backbone, solution.plan, samples, classes=len(task.labels), seed=0)
    ks.export_bundle(small.model, backbone, solution.plan, images, spec, folder)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kiridashi_server.amp.learning import learn_scores
    from kiridashi_server.backbone import Backbone
    from kiridashi_server.bank.learning import learn_record
    from kiridashi_server.bank.store import Bank
    from kiridashi_server.budget.solver import plan_cut
    from kiridashi_server.graph.cost import CostModel
    from kiridashi_server.graph.cut import cut
    from kiridashi_server.pipeline import compose_scores, export_bundle, profile_backbone
    from kiridashi_server.recover.iterations import recover_cut
    from kiridashi_server.similarity.comparison import compare
    from kiridashi_server.tasks.folder import load_task

_PLACES = {
    "Backbone": "backbone",
    "Bank": "bank.store",
    "CostModel": "graph.cost",
    "compare": "similarity.comparison",
    "compose_scores": "pipeline",
    "cut": "graph.cut",
    "export_bundle": "pipeline",
    "learn_record": "bank.learning",
    "learn_scores": "amp.learning",
    "load_task": "tasks.folder",
    "plan_cut": "budget.solver",
    "profile_backbone": "pipeline",
    "recover_cut": "recover.iterations",
}
__all__ = [
    "Backbone",
    "Bank",
    "CostModel",
    "compare",
    "compose_scores",
    "cut",
    "export_bundle",
    "learn_record",
    "learn_scores",
    "load_task",
    "plan_cut",
    "profile_backbone",
    "recover_cut",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(f"kiridashi_server.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'kiridashi_server' has no attribute '{name}'")
