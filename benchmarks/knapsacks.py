"""Knapsacks of widths to solve, of a small network and of two real layouts; and as integer linear programs."""

from collections.abc import Mapping, Sequence

import numpy as np
from kiridashi_server.budget.problem import Choice, FloatArray, Problem, Resource
from kiridashi_server.compose.ladder import widths_of
from kiridashi_server.graph.polynomial import Polynomial, counted
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array


def small_network(seed: int, shares: Sequence[float]) -> tuple[list[Choice], list[Resource]]:
    """A stem, two residual stages with expansions, and one resource per share: parameters first, then computation."""
    sizes = {"stem": 16, "a": 24, "a0": 48, "a1": 64, "b": 32, "b0": 64, "head": 64}
    edges = (("stem", "a"), ("a", "a0"), ("a", "a1"), ("a1", "b"), ("b", "b0"), ("b", "head"))
    choices = _choices(sizes, seed, dict.fromkeys(sizes, 8))
    resources = []
    for index, share in enumerate(shares):
        pixels = [1.0 if index == 0 else 4.0 ** (len(edges) - place) for place in range(len(edges))]
        terms = ((27.0, ("stem",)), *((9.0 * pixel, edge) for pixel, edge in zip(pixels, edges, strict=True)))
        dense = sum(c * float(np.prod([sizes[name] for name in names])) for c, names in terms)
        resources.append(Resource(f"r{index}", counted(terms), share * dense))
    return choices, resources


def ilp_optimum(choices: Sequence[Choice], resources: Sequence[Resource]) -> float:
    """The optimum by HiGHS, for products of at most two groups: one binary a width, and one variable a pair of widths.

    A pair's variables sum, over either group, to the other group's binaries; that is the strongest such formulation.

    Raises:
        ValueError: HiGHS found none.
    """
    problem = Problem.of(choices, resources)
    offsets = np.cumsum([0, *(len(choice.widths) for choice in choices)])
    pairs = sorted({owners for names in problem.monomials if len(owners := _owners(problem, names)) == 2})
    counts = [len(choices[a].widths) * len(choices[b].widths) for a, b in pairs]
    starts = dict(zip(pairs, np.cumsum([offsets[-1], *counts]), strict=False))
    total = int(offsets[-1]) + sum(counts)
    objective, binary = np.zeros(total), np.zeros(total)
    binary[: offsets[-1]] = 1
    rows: list[tuple[dict[int, float], float, float]] = []
    for index, choice in enumerate(choices):
        objective[offsets[index] : offsets[index + 1]] = -choice.values
        rows.append(({int(at): 1.0 for at in range(offsets[index], offsets[index + 1])}, 1.0, 1.0))
    for (a, b), start in starts.items():
        grid = start + np.arange(len(choices[a].widths) * len(choices[b].widths)).reshape(len(choices[a].widths), -1)
        for group, lines in ((a, grid), (b, grid.T)):
            for width, line in enumerate(lines):
                row = {int(at): 1.0 for at in line}
                rows.append((row | {int(offsets[group] + width): -1.0}, 0.0, 0.0))
    for resource in range(len(resources)):
        row = {}
        for monomial, names in enumerate(problem.monomials):
            price = float(problem.coefficients[resource, monomial])
            owners = _owners(problem, names)
            factors = [_product_of(problem, names, owner) for owner in owners]
            if len(owners) == 1:
                first, amounts = int(offsets[owners[0]]), factors[0]
            else:
                first, amounts = int(starts[owners]), np.outer(*factors).ravel()
            for at, amount in enumerate(amounts):
                row[first + at] = row.get(first + at, 0.0) + price * float(amount)
        rows.append((row, -np.inf, float(problem.limits[resource] - problem.constants[resource])))
    matrix = lil_array((len(rows), total))
    for place, (row, _, _) in enumerate(rows):
        for at, amount in row.items():
            matrix[place, at] = amount
    constraint = LinearConstraint(matrix.tocsr(), [low for _, low, _ in rows], [high for *_, high in rows])
    result = milp(
        objective, constraints=constraint, integrality=binary, bounds=Bounds(0, 1), options={"mip_rel_gap": 0}
    )
    if not result.success:
        raise ValueError(result.message)
    return -float(result.fun)


def _owners(problem: Problem, names: Sequence[int]) -> tuple[int, ...]:
    """The choices that a monomial depends on."""
    return tuple(sorted({int(problem.owners[name]) for name in names}))


def _product_of(problem: Problem, names: Sequence[int], owner: int) -> FloatArray:
    """The monomial's factors of one choice, at its widths."""
    return np.prod([problem.tables[name] for name in names if problem.owners[name] == owner], axis=0)


def inverted_residuals(seed: int, *, multiple: int = 8) -> tuple[list[Choice], Polynomial, Polynomial]:
    """The layout of EfficientNet-Lite0 at 64 pixels: choices, parameters, and multiply-accumulates."""
    stages = ((24, 2, 3, 2), (40, 2, 5, 2), (80, 3, 3, 2), (112, 3, 5, 1), (192, 4, 5, 2), (320, 1, 3, 1))
    sizes, side = {"stem": 32, "s0": 16}, 32
    parameters = [(27.0 + 13.0, ("stem",)), (1.0, ("stem", "s0")), (2.0, ("s0",))]
    macs = [(36.0 * side**2, ("stem",)), (1.0 * side**2, ("stem", "s0"))]
    before = "s0"
    for number, (width, repeats, kernel, stride) in enumerate(stages, start=1):
        after = f"s{number}"
        for block in range(repeats):
            inner, stream = f"{after}.{block}", before if block == 0 else after
            out = side // stride if block == 0 else side
            sizes |= {inner: 6 * sizes[stream], after: width}
            parameters += [(1.0, (stream, inner)), (kernel**2 + 4.0, (inner,)), (1.0, (inner, after)), (2.0, (after,))]
            macs += [(1.0 * side**2, (stream, inner)), (1.0 * (kernel * out) ** 2, (inner,))]
            macs += [(1.0 * out**2, (inner, after))]
            side = out
        before = after
    sizes["head"] = 1280
    parameters += [(1.0, (before, "head")), (2.0, ("head",))]
    macs += [(1.0 * side**2, (before, "head"))]
    return _choices(sizes, seed, dict.fromkeys(sizes, multiple)), counted(parameters), counted(macs)


def vision_transformer(seed: int, *, blocks: int = 12) -> tuple[list[Choice], Polynomial, Polynomial]:
    """The layout of ViT-B/16 at 224 pixels with its residual stream: choices, parameters, and multiply-accumulates."""
    sizes, steps = {"stream": 768}, {"stream": 8}
    patch, tokens = 3.0 * 16**2, 196 + 1
    parameters = [(patch + 1 + tokens + 1 + 2, ("stream",))]  # patches, positions, class token, last normalisation
    macs = [(patch * (tokens - 1), ("stream",))]
    for block in range(blocks):
        heads, query, value, hidden = (f"{block}.{part}" for part in ("heads", "query", "value", "hidden"))
        sizes |= {heads: 12, query: 64, value: 64, hidden: 3072}
        steps |= {heads: 1, query: 8, value: 8, hidden: 8}
        parameters += [(2.0, ("stream", heads, query)), (2.0, ("stream", heads, value)), (2.0, ("stream", hidden))]
        parameters += [(2.0, (heads, query)), (1.0, (heads, value)), (1.0, (hidden,)), (6.0, ("stream",))]
        macs += [(tokens * coefficient, names) for coefficient, names in parameters[-7:-4]]
        macs += [(float(tokens**2), (heads, query)), (float(tokens**2), (heads, value))]
    return _choices(sizes, seed, steps), counted(parameters), counted(macs)


def _choices(sizes: Mapping[str, int], seed: int, steps: Mapping[str, int]) -> list[Choice]:
    rng = np.random.default_rng(seed)
    choices = []
    for name, size in sizes.items():
        widths = widths_of(size, steps[name], 0.05)
        ranked = np.sort(rng.gamma(1.0, size=size))[::-1].cumsum() * rng.gamma(2.0)
        choices.append(Choice(name, widths, ranked[widths - 1]))
    return choices
