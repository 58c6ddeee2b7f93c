"""A new task's few samples under the masks of records: what measures that read masked features need.

A cut equals the masked dense model, so the features under a mask are those of the cut the record alone would make,
before any repair, with zeros in place of the dropped ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kiridashi_server.amp.scores import ScoreMap
from kiridashi_server.amp.taylor import taylor_scores
from kiridashi_server.backbone import Backbone
from kiridashi_server.bank.record import Record
from kiridashi_server.compose.selection import select
from kiridashi_server.graph.gates import insert_gates
from kiridashi_server.recover.inputs import run_batched, to_input
from kiridashi_server.recover.ridge import fit_ridge_head
from kiridashi_server.similarity.descriptor import Descriptor, Need
from kiridashi_server.tasks.task import Samples

MASKED_SHARE = 0.3


class MaskedBackbone:
    """One gated copy of the backbone, for all masks. A mask costs one forward pass, about as long as the dense one.

    Args:
        backbone: stays as it is.
        images: uint8 [N, H, W, 3].
        share: of the dense parameters, kept by every mask.
    """

    def __init__(self, backbone: Backbone, images: npt.NDArray[np.uint8], share: float = MASKED_SHARE) -> None:
        self._backbone = backbone
        self._gated = insert_gates(backbone.program, backbone.tracking).requires_grad_(False)
        self._inputs = to_input(backbone, images)
        self._share = share

    def features(self, scores: ScoreMap) -> npt.NDArray[np.float32]:
        """The samples' features under the mask that keeps the share by these scores, float32 [N, D].

        Raises:
            InputError: the scores do not fit the backbone's layout.
            BudgetError: the share is below the floors of its groups.
        """
        plan = select(scores, self._backbone.layout, self._backbone.costs, self._share)
        gates = {name: torch.zeros(size) for name, size in self._gated.sizes.items()}
        for name, gate in gates.items():
            gate[list(plan.kept[name])] = 1
        found: npt.NDArray[np.float32] = run_batched(_AtGates(self._gated, gates), self._inputs).numpy()
        return found


class _AtGates(nn.Module):
    def __init__(self, gated: nn.Module, gates: dict[str, Tensor]) -> None:
        super().__init__()
        self._gated = gated
        self._gates = gates

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self._gated(inputs, self._gates)
        return result


def describe(
    backbone: Backbone,
    samples: Samples,
    classes: int,
    records: Sequence[Record] = (),
    *,
    needs: Iterable[Need] = (),
    share: float = MASKED_SHARE,
    seed: int = 0,
) -> Descriptor:
    """The descriptor of a task, with what the measures in question need and no more.

    One dense forward; for ``masked`` one more for every record; for ``taylor`` a forward and a backward.

    Args:
        backbone: the dense model.
        samples: the task's few labelled samples.
        classes: how many classes it has.
        records: of this backbone and layout.
        needs: of the measures that will be asked.
        share: of parameters, kept by the masks.
        seed: of the order in which first-order scores see the samples.
    """
    wanted = set(needs)
    inputs = to_input(backbone, samples.images)
    features = run_batched(backbone.program, inputs).numpy()
    taylor: ScoreMap = {}
    if "taylor" in wanted:
        head, generator = fit_ridge_head(features, samples.labels, classes), torch.Generator().manual_seed(seed)
        labels = torch.from_numpy(samples.labels)
        taylor = taylor_scores(backbone.program, backbone.tracking, head, inputs, labels, generator=generator)
    masked = {}
    if "masked" in wanted:
        under = MaskedBackbone(backbone, samples.images, share)
        masked = {record.id: under.features(record.scores) for record in records}
    return Descriptor(features, samples.labels, masked, taylor)
