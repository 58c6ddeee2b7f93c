"""What a line's model is cut out of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from kiridashi_server.backbone import Backbone
from kiridashi_server.graph.plan import Plan
from kiridashi_server.graph.tracker import Tracking


@dataclass(frozen=True, eq=False)
class Blank:
    """A program, what is known of it, and what of it is to stay.

    Attributes:
        program: the backbone, or a piece that was cut from it before.
        tracking: of the program.
        plan: for the program's own layout.
    """

    program: fx.GraphModule
    tracking: Tracking
    plan: Plan

    @classmethod
    def of(cls, backbone: Backbone, plan: Plan) -> Blank:
        """The whole backbone."""
        return cls(backbone.program, backbone.tracking, plan)
