"""The layout as a picture: what is cut with what, and which weights join groups. Plain text formats, no library."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from html import escape
from itertools import combinations

from kiridashi_server.graph.layout import Group, Kind, Layout

_COLOURS: Mapping[Kind, str] = {"filter": "#4477aa", "head": "#aa3377", "node": "#228833"}
_ROW, _BAR, _MARGIN, _LETTER = 22, 240, 12, 7.2


def layout_links(layout: Layout) -> Mapping[tuple[str, str], tuple[str, ...]]:
    """Which weights join two groups, one on each of two axes: (earlier group, later group) -> names of the weights."""
    axes: dict[str, list[tuple[int, int]]] = {}
    for place, group in enumerate(layout.groups):
        for member in group.members:
            axes.setdefault(member.parameter, []).append((place, member.axis))
    links: dict[tuple[int, int], set[str]] = {}
    for parameter, places in axes.items():
        for (first, axis), (second, other) in combinations(sorted(set(places)), 2):
            if first != second and axis != other:
                links.setdefault((first, second), set()).add(parameter)
    names = [group.name for group in layout.groups]
    return {(names[first], names[second]): tuple(sorted(links[first, second])) for first, second in sorted(links)}


def layout_dot(layout: Layout) -> str:
    """The groups and their links in Graphviz' DOT language."""
    lines = ["graph layout {", "  rankdir=LR;", '  node [shape=box, style="rounded,filled", fontcolor=white];']
    for group in layout.groups:
        label = f"{group.name}\\n{group.size} x {group.kind}"
        lines.append(f'  {_quoted(group.name)} [label={_quoted(label)}, fillcolor="{_COLOURS[group.kind]}"];')
    for (source, target), weights in layout_links(layout).items():
        tooltip = _quoted(", ".join(weights))
        lines.append(f"  {_quoted(source)} -- {_quoted(target)} [edgetooltip={tooltip}];")
    return "\n".join([*lines, "}", ""])


def layout_svg(layout: Layout) -> str:
    """The groups from the input (top) to the output as bars, and an arc for each pair that a weight joins.

    A bar is as long as the logarithm of the group's units; its colour tells filters, heads and nodes apart. The
    full list of a group's parameters appears when it is pointed at.
    """
    names = max([0, *(len(group.name) for group in layout.groups)]) * _LETTER
    left = _MARGIN * 2 + names
    places = {group.name: _MARGIN + _ROW * (row + 1) for row, group in enumerate(layout.groups)}
    arcs = list(_arcs(layout, places, left + _BAR + 60))
    width = left + _BAR + 60 + max([0, *(bulge for _, bulge in arcs)]) + _MARGIN
    height = _MARGIN * 3 + _ROW * (len(layout.groups) + 1)
    body = [_bar(group, places[group.name], left) for group in layout.groups]
    body += [arc for arc, _ in arcs]
    body.append(f'<text x="{_MARGIN}" y="{height - _MARGIN}" fill="#666">{escape(_summary(layout))}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'font-family="monospace" font-size="12" role="img" aria-label="{escape(_summary(layout))}">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _bar(group: Group, middle: float, left: float) -> str:
    length = max(4.0, _BAR * min(1.0, math.log2(1 + group.size) / 12))
    parameters = escape("\n".join(f"{member.parameter}[{member.axis}]" for member in group.members))
    return (
        f"<g><title>{parameters}</title>"
        f'<text x="{_MARGIN}" y="{middle + 4:.0f}">{escape(group.name)}</text>'
        f'<rect x="{left:.0f}" y="{middle - 7:.0f}" width="{length:.0f}" height="14" rx="3" '
        f'fill="{_COLOURS[group.kind]}"/>'
        f'<text x="{left + length + 6:.0f}" y="{middle + 4:.0f}">{group.size} {group.kind}</text></g>'
    )


def _arcs(layout: Layout, places: Mapping[str, float], start: float) -> Iterator[tuple[str, float]]:
    """Each link as a curve at the right of the bars, and how far it bulges."""
    for (source, target), weights in layout_links(layout).items():
        first, last = places[source], places[target]
        bulge = 8 + 0.18 * abs(last - first)
        curve = f"M{start:.0f} {first:.0f} C{start + bulge * 4 / 3:.0f} {first:.0f} "
        curve += f"{start + bulge * 4 / 3:.0f} {last:.0f} {start:.0f} {last:.0f}"
        yield f'<path d="{curve}" fill="none" stroke="#999"><title>{escape(", ".join(weights))}</title></path>', bulge


def _summary(layout: Layout) -> str:
    units = sum(group.size for group in layout.groups)
    return f"{len(layout.groups)} groups, {units} units, {len(layout.frozen)} frozen axes"


def _quoted(text: str) -> str:
    return '"' + text.replace('"', r"\"") + '"'
