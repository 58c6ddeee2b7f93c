"""The exported program as the one representation of a model, and the passes over it.

One pass a module: ``program`` captures, ``tracker`` finds the ``layout``, ``gates`` puts a factor on every unit,
``cut`` carries out a ``plan``, ``cost`` counts, ``statistics`` refreshes, ``fold`` folds normalisation, and
``picture`` draws. A new operator is a rule in ``operators``.
"""

from kiridashi_server.graph.cost import CostModel
from kiridashi_server.graph.cut import cut, load_cut, masked, save_cut
from kiridashi_server.graph.errors import GraphError, PlanError
from kiridashi_server.graph.fold import fold_batch_norm
from kiridashi_server.graph.gates import Gated, insert_gates
from kiridashi_server.graph.layout import Frozen, Group, Layout, Member
from kiridashi_server.graph.picture import layout_dot, layout_svg
from kiridashi_server.graph.plan import Plan
from kiridashi_server.graph.program import capture
from kiridashi_server.graph.statistics import reestimate_batch_norm, set_batch_norm_training
from kiridashi_server.graph.tracker import Tracking, track

__all__ = [
    "CostModel",
    "Frozen",
    "Gated",
    "GraphError",
    "Group",
    "Layout",
    "Member",
    "Plan",
    "PlanError",
    "Tracking",
    "capture",
    "cut",
    "fold_batch_norm",
    "insert_gates",
    "layout_dot",
    "layout_svg",
    "load_cut",
    "masked",
    "reestimate_batch_norm",
    "save_cut",
    "set_batch_norm_training",
    "track",
]
