"""A record from an existing checkpoint, without the data that it was trained on.

What a checkpoint tells depends on what was done to it:

* **tuned**, with the backbone's shapes: ``S_j = |sum_i w_i (w_i - w0_i)|`` over all weights of unit j, ``w`` tuned and
  ``w0`` the backbone's. Scaling the whole unit changes the loss by ``sum_i w_i dL/dw_i``, and small gradient steps
  leave ``w - w0`` opposite to the summed gradient: it is a first-order score, taken from the way that tuning went;
* **masked**, with weights set to zero: ``S_j = sum_i |w_i|`` over the weights that are left, 0 for a unit without any;
* **pruned** by Kiridashi (:func:`~kiridashi_server.graph.cut.save_cut`): the same for the units that stayed, divided
  by their mean in the group, and 0 for those that went.

None of them is on the scale of learnt scores; composition keeps their order only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
from kiridashi.errors import InputError
from torch import Tensor, fx

from kiridashi_server.amp.scores import ScoreArray, check_scores
from kiridashi_server.backbone import Backbone
from kiridashi_server.bank.checkpoint import Checkpoint, backbone_weights, read_checkpoint
from kiridashi_server.bank.record import Kind, Provenance, Record
from kiridashi_server.graph.cut import is_saved_cut, load_cut
from kiridashi_server.graph.dims import resolve, units_along
from kiridashi_server.graph.program import tensor_of
from kiridashi_server.graph.tracker import Tracking, track

FloatArray = npt.NDArray[np.float64]

_MASKED_SHARE = 0.01
"""Share of the backbone's non-zero weights that are zero in a checkpoint from which it counts as masked."""


def record_from_model(
    backbone: Backbone, path: Path, task: str, labels: Sequence[str] = (), *, now: datetime | None = None
) -> Record:
    """A record of what the checkpoint in ``path`` tells about ``backbone``: scores, and neither head nor moments.

    Args:
        backbone: what the checkpoint was made from.
        path: a safetensors file, a torch state dict, or a cut that Kiridashi saved.
        task: what it was made for.
        labels: the task's classes, if known.
        now: the time to note; by default the clock's.

    Raises:
        InputError: the file cannot be read, is not of this backbone, or equals it, so that it tells nothing.
        GraphError: it is a cut of another layout or program.
    """
    checkpoint = read_checkpoint(path, backbone)
    if is_saved_cut(checkpoint.metadata):
        kind, scores, note = _of_cut(backbone, path)
    else:
        kind, scores, note = _of_weights(backbone, checkpoint)
    check_scores(scores, backbone.layout.sizes)
    return Record(
        task=task,
        labels=tuple(labels),
        backbone_fingerprint=backbone.fingerprint,
        layout_digest=backbone.layout.digest,
        samples=0,
        scores=scores,
        provenance=Provenance(
            seed=0,
            settings={},
            code_version=version("kiridashi"),
            task_digest="",
            seconds=0.0,
            origin=f"{note}; {path.name}, sha256:{checkpoint.sha256}",
        ),
        created=(now or datetime.now(UTC)).isoformat(timespec="seconds"),
        kind=kind,
    )


def _of_weights(backbone: Backbone, checkpoint: Checkpoint) -> tuple[Kind, dict[str, ScoreArray], str]:
    found = backbone_weights(checkpoint, backbone)
    names = backbone.tracking.parameters
    new = {name: _array(found[name]) for name in names}
    old = {name: _array(tensor_of(backbone.program, name)) for name in names}
    if all(np.array_equal(new[name], old[name]) for name in names):
        raise InputError(
            f"{checkpoint.path} has the weights of {backbone.name} itself",
            why="nothing was tuned or pruned, so it says nothing about a task",
        )
    emptied = sum(int(((new[name] == 0) & (old[name] != 0)).sum()) for name in names)
    if emptied > _MASKED_SHARE * sum(int((old[name] != 0).sum()) for name in names):
        return "masked", _norms(backbone.tracking, new), f"weights set to zero: {emptied}"
    moved = _unit_sums(backbone.tracking, lambda name: new[name] * (new[name] - old[name]))
    return "tuned", {name: _float(np.abs(values)) for name, values in moved.items()}, "tuned weights"


def _of_cut(backbone: Backbone, path: Path) -> tuple[Kind, dict[str, ScoreArray], str]:
    plan, small = load_cut(backbone.program, backbone.tracking, path)
    norms = _norms(track(small, cuttable_output=True), _arrays(small))
    scores = {}
    for group in backbone.layout.groups:
        kept = np.asarray(plan.kept[group.name])
        values = norms.get(group.name, np.ones(len(kept), dtype=np.float32))
        scores[group.name] = np.zeros(group.size, dtype=np.float32)
        scores[group.name][kept] = values / (float(values.mean()) or 1.0)
    return "pruned", scores, "mask only"


def weight_norms(tracking: Tracking, tensors: Mapping[str, Tensor]) -> dict[str, ScoreArray]:
    """Sums of absolute weights by unit, float32 [size]; vectors, such as biases and normalisation, are left out.

    Args:
        tracking: names the parameters and what their axes run over.
        tensors: the parameters by name.
    """
    return _norms(tracking, {name: _array(tensors[name]) for name in tracking.parameters})


def _norms(tracking: Tracking, weights: Mapping[str, FloatArray]) -> dict[str, ScoreArray]:
    """Sums of absolute weights by unit; vectors, such as biases and normalisation, are left out."""
    sums = _unit_sums(tracking, lambda name: np.abs(weights[name]) if weights[name].ndim > 1 else None)
    return {name: _float(values) for name, values in sums.items()}


def _unit_sums(tracking: Tracking, values_of: Callable[[str], FloatArray | None]) -> dict[str, FloatArray]:
    """``values_of`` a parameter summed over all elements of each unit, float64 [size] by group."""
    sums = {}
    for group in tracking.layout.groups:
        (atom,) = resolve((tracking.atoms[group.name],))
        sums[group.name] = np.zeros(group.size)
        for member in group.members:
            values = values_of(member.parameter)
            if values is None:
                continue
            units = units_along(tracking.tensors[member.parameter][member.axis], atom)
            along = values.sum(axis=tuple(axis for axis in range(values.ndim) if axis != member.axis))
            sums[group.name] += np.bincount(units[units >= 0], along[units >= 0], group.size)
    return sums


def _arrays(program: fx.GraphModule) -> dict[str, FloatArray]:
    return {name: _array(parameter) for name, parameter in program.named_parameters()}


def _array(tensor: Tensor) -> FloatArray:
    array: FloatArray = tensor.detach().double().numpy()
    return array


def _float(values: FloatArray) -> ScoreArray:
    return values.astype(np.float32)
