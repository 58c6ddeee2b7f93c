"""The layout in which a train step is fast: channels first, then samples, ``[C, N, H, W]``.

Trained weights are inputs of the graph, so the runtime can neither pack them nor use its blocked convolutions. In this
layout a 1x1 convolution and both its gradients are one plain matrix product each, over all samples and places at once,
without any transposition. A depthwise convolution becomes products of small matrices, one a channel: with
``s[t, i, o]`` = 1 where tap t of output o reads input i,

    small maps:  y[c] = x[c] T[c],  T[c] = sum over taps of w[c, a, b] s_a s_b     ([N, HW] times [HW, HoWo])
    rows:        y[c] = sum over a of x_a[c] T_a[c],  T_a[c] = sum over b of w[c, a, b] s_b   (rows shifted by a)

so that its gradients are products, too. On wide maps the zeros in T cost more than they save; there the channels of all
samples are convolved as one image of ``C N`` channels.

The pass changes what depends on a trained parameter. All before it stays an inference graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from kiridashi_server.graph.program import arguments, operator_name, tensor_of

aten = torch.ops.aten
SMALL_PLACES = 64
"""Largest number of places, before and after, of a map that is taken as one product."""
LARGEST_ROW = 32
"""Widest row of results that is taken as a product."""

_ALONG = frozenset(
    {"relu", "hardtanh", "silu", "sigmoid", "hardswish", "hardsigmoid", "gelu", "leaky_relu", "add", "mul"}
)
_SPATIAL = frozenset({"adaptive_avg_pool2d", "avg_pool2d", "max_pool2d"})
_MAP_RANK = 4


def channels_outside(program: fx.GraphModule, trained: Collection[str]) -> fx.GraphModule:
    """The same program, its weights shared, with ``[C, N, H, W]`` inside wherever that makes training faster.

    Args:
        program: features of images [N, 3, H, W]; left as it is.
        trained: names of its trained parameters. What does not depend on them stays as it is.
    """
    in_place = [node for node in program.graph.nodes if out_of_place(node.target) is not node.target]
    if any(len(node.all_input_nodes[0].users) > 1 for node in in_place):
        return program  # what reads the changed value is then not told by the graph alone
    return _Pass(program, frozenset(trained)).run()


def out_of_place(target: object) -> Any:
    """``aten::add`` for ``aten::add_``, and any other target itself."""
    if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
        plain = getattr(torch.ops.aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
        return getattr(plain, target._overloadname, target)
    return target


class _Pass:
    """One walk over a program. ``swapped`` are the new nodes whose first two axes have changed places."""

    def __init__(self, program: fx.GraphModule, trained: frozenset[str]) -> None:
        self._program = program
        self._graph = fx.Graph()
        self._new: dict[fx.Node, fx.Node] = {}
        self._live: set[fx.Node] = set()
        self._swapped: set[fx.Node] = set()
        self._turned: dict[fx.Node, fx.Node] = {}
        self._trained = trained

    def run(self) -> fx.GraphModule:
        for node in self._program.graph.nodes:
            trained = node.op == "get_attr" and str(node.target) in self._trained
            if trained or any(source in self._live for source in node.all_input_nodes):
                self._live.add(node)
            self._new[node] = self._converted(node)
        return fx.GraphModule(self._program, self._graph)

    def _converted(self, node: fx.Node) -> fx.Node:
        name = operator_name(node).removesuffix("_")
        if name == "conv2d" and node in self._live:
            function = _form(arguments(node), self._sizes)
            if function is not None:
                return self._convolution(node, function)
        if (name in _ALONG or name in _SPATIAL) and self._maps_only(node):
            moved = self._copied(node, self._turn)
            self._swapped.add(moved)
            return moved
        return self._copied(node, self._back)

    def _copied(self, node: fx.Node, form: Callable[[fx.Node], fx.Node]) -> fx.Node:
        copied = self._graph.node_copy(node, lambda source: form(self._new[source]))
        if copied.op == "call_function":
            copied.target = out_of_place(copied.target)
        return copied

    def _convolution(self, node: fx.Node, function: Any) -> fx.Node:
        values = arguments(node)
        weight, bias = (values[key] and self._new[values[key]] for key in ("weight", "bias"))
        moved = self._graph.call_function(
            function,
            (self._turn(self._new[values["input"]]), weight, bias, tuple(values["stride"]), tuple(values["padding"])),
        )
        self._swapped.add(moved)
        return moved

    def _maps_only(self, node: fx.Node) -> bool:
        """Whether an operator reads a map with swapped axes, and nothing but maps."""
        sources = node.all_input_nodes
        ranks = [len(self._sizes(source)) for source in sources]
        return all(rank == _MAP_RANK for rank in ranks) and any(self._new[one] in self._swapped for one in sources)

    def _sizes(self, node: fx.Node) -> tuple[Any, ...]:
        value = tensor_of(self._program, str(node.target)) if node.op == "get_attr" else node.meta.get("val")
        return tuple(value.shape) if isinstance(value, Tensor) else ()

    def _turn(self, node: fx.Node) -> fx.Node:
        return node if node in self._swapped else self._transposed(node)

    def _back(self, node: fx.Node) -> fx.Node:
        return self._transposed(node) if node in self._swapped else node

    def _transposed(self, node: fx.Node) -> fx.Node:
        if node not in self._turned:
            self._turned[node] = self._graph.call_function(aten.transpose.int, (node, 0, 1))
            if node not in self._swapped:
                self._swapped.add(self._turned[node])
        return self._turned[node]


def _form(values: Mapping[str, Any], sizes: Any) -> Any:
    """The function that stands for a convolution, ``None`` where its own operator is the best there is."""
    outputs, inputs, *kernel = sizes(values["weight"])
    stride, padding, groups = list(values["stride"]), values["padding"], values["groups"]
    if isinstance(padding, str) or any(step != 1 for step in values["dilation"]):
        return None
    maps = [size for size in sizes(values["input"])[2:] if isinstance(size, int)]
    if groups == 1 and kernel == [1, 1] and stride == [1, 1] and not any(padding):
        return pointwise
    whole = len(maps) == len(kernel) and all(size % step == 0 for size, step in zip(maps, kernel, strict=True))
    if groups == 1 and stride == kernel and not any(padding) and whole:
        return patches
    return depthwise if inputs == 1 and outputs == groups else None


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, stride: object, padding: object) -> Tensor:
    """A 1x1 convolution of [C, N, H, W] by [O, C, 1, 1]: [O, N, H, W]."""
    flat, matrix = x.reshape(x.shape[0], -1), weight.reshape(weight.shape[0], -1)
    product = matrix @ flat if bias is None else torch.addmm(bias[:, None], matrix, flat)
    return product.reshape(weight.shape[0], *x.shape[1:])


def patches(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: object) -> Tensor:
    """A convolution whose windows lie side by side: [C, N, H, W] by [O, C, k, l] to [O, N, H/k, W/l]."""
    (k, m), (channels, samples, height, width) = stride, x.shape
    pieces = x.reshape(channels, samples, height // k, k, width // m, m).permute(0, 3, 5, 1, 2, 4)
    flat = pieces.reshape(channels * k * m, -1)
    product = pointwise(flat[:, :, None, None], weight.reshape(weight.shape[0], -1, 1, 1), bias, None, None)
    return product.reshape(weight.shape[0], samples, height // k, width // m)


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """A convolution of every channel by itself: [C, N, H, W] by [C, 1, k, l]."""
    sizes = (int(x.shape[2]), int(x.shape[3]))
    kernel = (int(weight.shape[2]), int(weight.shape[3]))
    reached = tuple((n + 2 * p - k) // s + 1 for n, p, k, s in zip(sizes, padding, kernel, stride, strict=True))
    if sizes[0] * sizes[1] <= SMALL_PLACES and reached[0] * reached[1] <= SMALL_PLACES:
        result = _whole_maps(x, weight, (reached[0], reached[1]), stride, padding)
    elif reached[1] <= LARGEST_ROW:
        result = _rows(x, weight, (reached[0], reached[1]), stride, padding)
    else:
        result = _one_image(x, weight, stride, padding)
    return result if bias is None else result + bias[:, None, None, None]


def _taps(size: int, reached: int, kernel: int, step: int, pad: int) -> Tensor:
    """``s[t, i, o]``: 1 where tap t of output o reads input i; float32 [kernel, size, reached]."""
    tap = torch.arange(kernel)[:, None, None]
    source, place = torch.arange(size)[None, :, None], torch.arange(reached)[None, None, :]
    return (source == place * step + tap - pad).float()


def _whole_maps(
    x: Tensor, weight: Tensor, reached: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    channels, samples, height, width = x.shape
    k, m = weight.shape[2:]
    down = _taps(height, reached[0], k, stride[0], padding[0])[:, None, :, None, :, None]
    right = _taps(width, reached[1], m, stride[1], padding[1])[None, :, None, :, None, :]
    spread = (down * right).reshape(k * m, -1)
    table = (weight.reshape(channels, -1) @ spread).reshape(channels, height * width, -1)
    return torch.bmm(x.reshape(channels, samples, -1), table).reshape(channels, samples, *reached)


def _rows(
    x: Tensor, weight: Tensor, reached: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    channels, samples, height, width = x.shape
    k, m, step = weight.shape[2], weight.shape[3], stride[0]
    spread = _taps(width, reached[1], m, stride[1], padding[1]).reshape(m, -1)
    table = (weight.reshape(channels * k, m) @ spread).reshape(channels, k * width, -1)
    filled = step * (reached[0] + (k - 1) // step)  # rows in steps: shifts are then slices without a step
    padded = torch.constant_pad_nd(x, (0, 0, padding[0], filled - height - padding[0]))
    steps = padded.reshape(channels, samples, filled // step, step * width)
    shifted = []
    for start in range(-(-k // step)):
        rows = min(step, k - start * step)
        part = steps[:, :, start : start + reached[0]]
        shifted.append(part if rows == step else part[..., : rows * width])
    gathered = torch.cat(shifted, 3) if len(shifted) > 1 else shifted[0]
    product = torch.bmm(gathered.reshape(channels, -1, k * width), table)
    return product.reshape(channels, samples, *reached)


def _one_image(x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    channels, samples = x.shape[:2]
    kernel = weight[:, None].expand(channels, samples, *weight.shape[1:]).reshape(channels * samples, *weight.shape[1:])
    image = x.reshape(1, channels * samples, *x.shape[2:])
    result = torch.conv2d(image, kernel, None, stride, padding, 1, channels * samples)
    return result.reshape(channels, samples, *result.shape[2:])
