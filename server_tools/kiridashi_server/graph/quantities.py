"""Everything that can be counted about the cuts of one program, before any is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from kiridashi_server.graph.activations import activation_peaks
from kiridashi_server.graph.cost import CostModel
from kiridashi_server.graph.layout import Layout
from kiridashi_server.graph.polynomial import Polynomial, counted, evaluate
from kiridashi_server.graph.tracker import Tracking
from kiridashi_server.graph.workload import Workload


@dataclass(frozen=True, eq=False)
class Quantities:
    """How cuts are counted.

    Attributes:
        layout: the groups.
        costs: parameters and multiply-accumulates.
        activations: elements of intermediate results alive at once; the largest of these polynomials counts.
    """

    layout: Layout
    costs: CostModel
    activations: tuple[Polynomial, ...]
    _program: fx.GraphModule
    _tracking: Tracking
    _workloads: dict[int, Workload] = field(default_factory=dict)

    @classmethod
    def of(cls, program: fx.GraphModule, tracking: Tracking) -> Quantities:
        """Count a tracked program."""
        peaks = tuple(counted(terms) for terms in activation_peaks(program, tracking))
        return cls(tracking.layout, CostModel.from_tracking(tracking), peaks, program, tracking)

    def workload(self, block: int) -> Workload:
        """Kinds of work for kernels that work on blocks of that many channels."""
        if block not in self._workloads:
            self._workloads[block] = Workload.of(self._program, self._tracking, block)
        return self._workloads[block]

    def alive(self, widths: Mapping[str, int]) -> float:
        """The peak of :attr:`activations` after a cut that keeps ``widths`` units; groups left out are whole."""
        counts = {**self.layout.sizes, **widths}
        return max((evaluate(terms, counts) for terms in self.activations), default=0.0)
