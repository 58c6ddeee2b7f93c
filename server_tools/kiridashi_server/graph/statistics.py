"""Batch-normalisation statistics of a program."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from kiridashi_server.graph.errors import GraphError
from kiridashi_server.graph.nodes import arguments, operator_name, set_argument
from kiridashi_server.graph.program import copy_program


def set_batch_norm_training(program: fx.GraphModule, on: bool) -> None:
    """Switch every batch normalisation with running statistics, in place, as ``module.train(on)`` would.

    When on, batches are normalised by their own mean and variance and the running statistics follow by the
    momentum the model was built with.
    """
    for node in program.graph.nodes:
        if operator_name(node) == "batch_norm" and arguments(node)["running_mean"] is not None:
            set_argument(node, "training", on)
    program.recompile()


def reestimate_batch_norm(program: fx.GraphModule, batches: Iterable[Tensor | tuple[Tensor, ...]]) -> fx.GraphModule:
    """A copy of ``program`` whose running statistics are those of ``batches``, each batch weighing the same.

    After a cut the statistics learnt by the dense model no longer fit. One forward pass for each batch
    refreshes all layers: a layer sees its input normalised by the batch's own statistics in the layers
    before it, and the mean over batches of its means and unbiased variances is stored.

    Args:
        program: any program; without batch normalisation the copy is simply equal.
        batches: inputs [N, ...], or tuples of them for a program with several; at least one, each with more
            than one value per channel.

    Raises:
        GraphError: no batch was given, or one is too small to have a variance.
    """
    refreshed = copy_program(program)
    interpreter = _Refresh(refreshed)
    with torch.no_grad():
        for batch in batches:
            interpreter.take(batch)
    if interpreter.seen == 0:
        raise GraphError(
            "no batch was given to estimate statistics from",
            next_step="pass at least one batch of inputs",
        )
    return refreshed


class _Refresh(fx.Interpreter):
    """Runs the graph with every batch normalisation in training mode and a cumulative average."""

    def __init__(self, program: fx.GraphModule) -> None:
        super().__init__(program)
        self.seen = 0

    def take(self, batch: Tensor | tuple[Tensor, ...]) -> None:
        self.seen += 1
        self.run(*(batch if isinstance(batch, tuple) else (batch,)))

    def run_node(self, n: fx.Node) -> Any:
        if operator_name(n) != "batch_norm":
            return super().run_node(n)
        values = fx.map_arg(dict(arguments(n)), self.env.__getitem__)
        source = values["input"]
        if source.numel() <= source.shape[1]:
            raise GraphError(
                f"a batch of shape {tuple(source.shape)} has no variance at {n.name}",
                why="one value for each channel",
                next_step="use batches of at least two inputs",
            )
        return functional.batch_norm(
            source,
            values["running_mean"],
            values["running_var"],
            values["weight"],
            values["bias"],
            training=True,
            momentum=1.0 / self.seen,  # the k-th batch weighs 1/k: the average over all so far
            eps=values["eps"],
        )
