"""The layout as a picture."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable

import pytest
from kiridashi_server.graph import Group, Layout, Member, Tracking, layout_dot, layout_svg
from kiridashi_server.graph.picture import layout_links
from torch import fx

Captured = Callable[[str], tuple[fx.GraphModule, Tracking]]
SVG = "{http://www.w3.org/2000/svg}"


def test_links_follow_the_weights(captured: Captured) -> None:
    _, tracking = captured("residual")
    assert dict(layout_links(tracking.layout)) == {
        ("stem", "expand"): ("expand.weight", "project.weight"),
        ("expand", "squeeze"): ("excite.weight", "squeeze.weight"),
    }


@pytest.mark.parametrize("name", ["residual", "branches", "attention"])
def test_every_group_and_link_is_drawn(name: str, captured: Captured) -> None:
    _, tracking = captured(name)
    layout = tracking.layout
    root = ElementTree.fromstring(layout_svg(layout))
    texts = [element.text for element in root.iter(f"{SVG}text")]
    for group in layout.groups:
        assert group.name in texts
        assert f"{group.size} {group.kind}" in texts
    assert len(list(root.iter(f"{SVG}path"))) == len(layout_links(layout))
    dot = layout_dot(layout)
    assert dot.count(" -- ") == len(layout_links(layout))
    assert all(f'"{group.name}" [' in dot for group in layout.groups)


def test_drawings_stay_within_their_frame(captured: Captured) -> None:
    root = ElementTree.fromstring(layout_svg(captured("branches")[1].layout))
    bars = [element for element in root.iter(f"{SVG}rect") if element.get("rx")]
    assert max(float(bar.get("y", 0)) for bar in bars) < float(root.get("height", 0))
    assert max(float(bar.get("x", 0)) + float(bar.get("width", 0)) for bar in bars) < float(root.get("width", 0))


def test_names_are_escaped() -> None:
    layout = Layout((Group('a<b>"&', 3, "node", (Member("a<b>.weight", 0),)),), ())
    assert 'a<b>"&' in [element.text for element in ElementTree.fromstring(layout_svg(layout)).iter(f"{SVG}text")]
    assert r'"a<b>\"&"' in layout_dot(layout)


def test_an_empty_layout_has_a_picture() -> None:
    assert "0 groups" in layout_svg(Layout((), ()))
    assert layout_dot(Layout((), ())).startswith("graph")
