"""First-order scores: how much the loss would change if a unit's gate were closed.

``score_j = sqrt( mean over micro-batches of (dL/dg_j)^2 )`` at gates of one, the Taylor (Fisher) group score of
Molchanov et al. 2019 (arXiv 1906.10771) taken at the gates, where coupled channels share one. Needs one backward pass a
micro-batch and learns nothing.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn import functional

from kiridashi_server.amp.scores import ScoreArray
from kiridashi_server.graph.gates import insert_gates
from kiridashi_server.graph.tracker import Tracking
from kiridashi_server.recover.ridge import RidgeHead


def taylor_scores(
    program: fx.GraphModule,
    tracking: Tracking,
    head: RidgeHead,
    inputs: Tensor,
    labels: Tensor,
    *,
    generator: torch.Generator,
    micro_batch: int = 8,
) -> dict[str, ScoreArray]:
    """Scores of every group, float32 [size], at least 0.

    Args:
        program: features in evaluation mode.
        tracking: of the program.
        head: the task's head on its features.
        inputs: float32 [N, 3, H, W].
        labels: int64 [N].
        generator: mixes the samples.
        micro_batch: samples a gradient is taken over; smaller is closer to the per-sample score and slower.
    """
    gated = insert_gates(program, tracking).requires_grad_(False)
    linear = head.as_linear().requires_grad_(False)
    gates = {group.name: torch.ones(group.size, requires_grad=True) for group in tracking.layout.groups}
    squares = {name: torch.zeros_like(gate) for name, gate in gates.items()}
    parts = torch.split(torch.randperm(len(inputs), generator=generator), micro_batch)
    for part in parts:
        loss = functional.cross_entropy(linear(gated(inputs[part], gates)), labels[part])
        gradients = torch.autograd.grad(loss, list(gates.values()))
        for name, gradient in zip(gates, gradients, strict=True):
            squares[name] += gradient.detach() ** 2
    return {name: np.sqrt(total.detach().numpy() / len(parts)).astype(np.float32) for name, total in squares.items()}
