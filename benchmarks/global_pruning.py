"""torch-pruning's global pruning as a plan: which channels it keeps, for a cut that is recovered like all others."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from efficientnet_lite_pytorch import EfficientNet
from kiridashi_server.backbone import Backbone
from kiridashi_server.graph.cut import cut
from kiridashi_server.graph.plan import Plan
from kiridashi_server.graph.program import tensor_names, tensor_of
from kiridashi_server.recover.inputs import run_batched, to_input
from kiridashi_server.recover.ridge import fit_ridge_head
from kiridashi_server.tasks import Samples
from torch import nn
from torch.nn import functional

IMPORTANCES: Mapping[str, str] = {"tp-taylor": "GroupTaylorImportance", "tp-magnitude": "GroupMagnitudeImportance"}
"""Methods, and torch-pruning's names of their importance; all with its defaults."""
_AGREEMENT = 1e-5


def lite0_module(backbone: Backbone, head: nn.Linear) -> nn.Module:
    """EfficientNet-Lite0 as the module that the backbone was captured from, with its weights and a classifier."""
    model: nn.Module = EfficientNet.from_name("efficientnet-lite0", image_size=backbone.input_size[1])
    model._dropout = nn.Identity()
    model._fc = nn.Identity()
    model.load_state_dict({name: tensor_of(backbone.program, name) for name in tensor_names(backbone.program)})
    model._fc = head
    return model.eval().requires_grad_(True)


def with_gradients(module: nn.Module, backbone: Backbone, samples: Samples) -> nn.Module:
    """The module with the gradient of the task's loss on its parameters, as first-order importance reads it."""
    logits = module(to_input(backbone, samples.images))
    functional.cross_entropy(logits, torch.from_numpy(samples.labels)).backward()  # type: ignore[no-untyped-call]
    return module


def task_head(backbone: Backbone, samples: Samples, classes: int) -> nn.Linear:
    """A ridge head on the dense model's features."""
    features = run_batched(backbone.program, to_input(backbone, samples.images)).numpy()
    return fit_ridge_head(features, samples.labels, classes).as_linear()


def global_plan(
    module: nn.Module, backbone: Backbone, method: str, ratio: float, *, multiple: int, head: str = "_fc"
) -> Plan:
    """Prune a copy of the module in one step over all its groups, and read off what stayed.

    Args:
        module: what ``backbone`` was captured from, with a linear classifier; gradients are read, if at all, here.
        backbone: the same weights.
        method: a key of :data:`IMPORTANCES`.
        ratio: share of all channels that torch-pruning is asked to remove.
        multiple: it rounds widths down to multiples of this.
        head: name of the classifier, whose outputs stay.

    Raises:
        ValueError: a group that was pruned is none of the layout's, or the cut by the plan is not the pruned module.
    """
    import torch_pruning

    small = copy.deepcopy(module)
    for parameter, original in zip(small.parameters(), module.parameters(), strict=True):
        parameter.grad = original.grad
    example = torch.randn(2, *backbone.input_size, generator=torch.Generator().manual_seed(0))
    pruner = torch_pruning.pruner.BasePruner(
        small,
        example,
        importance=getattr(torch_pruning.importance, IMPORTANCES[method])(),
        global_pruning=True,
        pruning_ratio=ratio,
        ignored_layers=[small.get_submodule(head)],
        round_to=multiple,
    )
    names = {id(part): name for name, part in small.named_modules()}
    kept: dict[str, set[int]] = {}
    for group in pruner.step(interactive=True):
        name = _group_of(backbone, names[id(group[0].dep.target.module)])
        if name in kept:
            raise ValueError(f"torch-pruning pruned the group {name} twice: its indices are not the original ones")
        kept[name] = set(range(backbone.layout.sizes[name])) - set(group[0].idxs)
        group.prune()
    plan = Plan.of(backbone.layout, kept)
    small.set_submodule(head, nn.Identity())
    _check(small.eval(), backbone, plan, example)
    return plan


def _group_of(backbone: Backbone, module: str) -> str:
    """The layout's group that runs over the output channels of a module."""
    found = [
        group.name
        for group in backbone.layout.groups
        for member in group.members
        if (member.parameter, member.axis) == (f"{module}.weight", 0)
    ]
    if len(found) != 1:
        raise ValueError(f"the output channels of {module} belong to {len(found)} groups of the layout")
    return found[0]


def _check(pruned: nn.Module, backbone: Backbone, plan: Plan, example: Any) -> None:
    small = cut(backbone.program, backbone.tracking, plan)
    theirs = sum(parameter.numel() for parameter in pruned.parameters())
    ours = backbone.costs.parameters(plan.counts)
    with torch.no_grad():
        expected, found = pruned(example), small(example)
    if theirs != ours or found.shape != expected.shape:
        raise ValueError(f"torch-pruning's model has {theirs:,} parameters, the cut by its plan {ours:,}")
    difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1))
    if not difference <= _AGREEMENT:
        raise ValueError(f"the cut by torch-pruning's plan differs from its model by {difference:.2g}")
