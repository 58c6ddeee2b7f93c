"""From a module to the exporter's graph: batches left open, writes and regions without gradients made plain."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn

from kiridashi_server.graph.regions import inline_regions
from kiridashi_server.graph.writes import others_see_writes, without_writes


def export(model: nn.Module, examples: tuple[Tensor, ...], *, dynamic_batch: bool) -> fx.GraphModule:
    """The graph of ``model`` for these inputs, as the exporter names everything; it raises what the exporter raises.

    Args:
        model: in evaluation mode; the exporter may leave marks on it.
        examples: the inputs, with a batch first.
        dynamic_batch: whether the first size of the first input, and of all that share it, stays open.
    """
    shown, shapes = _with_batch(model, examples) if dynamic_batch else (examples, None)
    exported = torch.export.export(model, shown, dynamic_shapes=shapes)
    module = exported.module()
    if others_see_writes(module.graph):
        module = without_writes(exported)
    inline_regions(module)
    return module


def _with_batch(model: nn.Module, examples: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """The inputs as they are shown to the exporter, and which of their sizes vary."""
    batch = examples[0].shape[0]
    varies = [example.dim() > 0 and example.shape[0] == batch for example in examples]
    # The exporter treats sizes 0 and 1 as constants, so a batch that shall vary is shown as two.
    shown = tuple(
        torch.cat([example, example]) if vary and batch == 1 else example
        for example, vary in zip(examples, varies, strict=True)
    )
    shapes = tuple({0: torch.export.Dim.DYNAMIC} if vary else None for vary in varies)
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    named = kinds.index(inspect.Parameter.VAR_POSITIONAL) if inspect.Parameter.VAR_POSITIONAL in kinds else len(shapes)
    if named < len(shapes):  # the exporter wants those of ``*inputs`` together
        return shown, (*shapes[:named], shapes[named:])
    return shown, shapes
