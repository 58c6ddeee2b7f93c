"""The layout: names, kinds, members, frozen axes with reasons, and a digest that outlives torch versions."""

from collections.abc import Callable

import pytest
from kiridashi_server.graph import GraphError, Layout, Member, PlanError, capture, rules, track
from kiridashi_server.graph.dims import freeze
from torch import Tensor, nn

Make = Callable[[str], nn.Module]


def layout_of(model: nn.Module, images: Tensor, *, cuttable_output: bool = False) -> Layout:
    return track(capture(model, images), cuttable_output=cuttable_output).layout


def test_groups_of_a_residual_network(make_model: Make, images: Tensor) -> None:
    layout = layout_of(make_model("residual"), images)
    assert [(group.name, group.size, group.kind) for group in layout.groups] == [
        ("stem", 8, "filter"),  # the residual stream: stem and projection share it
        ("expand", 12, "filter"),
        ("squeeze", 3, "filter"),
    ]
    members = layout.group("expand").members
    assert Member("depthwise.weight", 0) in members
    assert Member("project.weight", 1) in members
    assert Member("excite.bias", 0) in members
    assert Member("head.weight", 1) in layout.group("stem").members


def test_groups_of_joined_and_split_channels(make_model: Make, images: Tensor) -> None:
    layout = layout_of(make_model("branches"), images)
    assert {group.name: group.size for group in layout.groups} == {
        "left": 4,
        "right": 6,
        "joined": 4,
        "joined:filter2": 5,
        "low": 7,
        "gated": 6,
    }
    assert Member("norm.weight", 0) in layout.group("left").members
    assert Member("norm.weight", 0) in layout.group("right").members


def test_groups_of_attention(make_model: Make, images: Tensor) -> None:
    layout = layout_of(make_model("attention"), images)
    assert [(group.name, group.size, group.kind) for group in layout.groups] == [
        ("qkv:head", 4, "head"),
        ("up", 20, "node"),
    ]
    reasons = {(axis.parameter, axis.axis): axis.reason for axis in layout.frozen}
    assert reasons["norm.weight", 0] == "layer normalisation"
    assert reasons["position", 1] == "position"
    assert reasons["head.weight", 0] == "output"


def test_an_unknown_operator_freezes_what_it_touches_and_says_so(make_model: Make, images: Tensor) -> None:
    tracking = track(capture(make_model("unknown"), images))
    assert [group.name for group in tracking.layout.groups] == ["second"]
    assert tracking.unknown == {"renorm": 1}
    reasons = {axis.parameter: axis.reason for axis in tracking.layout.frozen if axis.axis == 0}
    assert reasons["first.weight"] == "operator without a rule here: renorm"


def test_a_rule_that_does_not_fit_its_call_is_no_rule(
    make_model: Make, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(rules._RULES, "renorm", lambda call: call.dims("self")[:-1])
    tracking = track(capture(make_model("unknown"), images))
    assert tracking.unknown == {"renorm": 1}
    assert [group.name for group in tracking.layout.groups] == ["second"]


def test_a_new_operator_is_one_rule(make_model: Make, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def along_rows(call: rules.Call) -> rules.Result | None:
        """As if every row were treated by itself."""
        source = call.dims("self")
        if source is not None:
            freeze(source[2], "treated as a whole")
        return source

    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    rules.rule("renorm")(along_rows)
    tracking = track(capture(make_model("unknown"), images))
    assert not tracking.unknown
    assert [group.name for group in tracking.layout.groups] == ["first", "second"]
    with pytest.raises(ValueError, match="has a rule already"):
        rules.rule("renorm")(along_rows)


def test_a_cuttable_output_is_a_group(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    assert layout_of(model, images).groups == ()
    (group,) = layout_of(model, images, cuttable_output=True).groups
    assert (group.name, group.size) == ("0", 6)


def test_a_map_of_features_is_no_cuttable_output(images: Tensor) -> None:
    with pytest.raises(GraphError, match="output cannot be cut"):
        layout_of(nn.Conv2d(3, 6, 1).double(), images, cuttable_output=True)


def test_the_digest_is_pinned(make_model: Make, images: Tensor) -> None:
    """A change here makes every stored score and plan unusable: it needs a migration, not a new number."""
    digests = {name: layout_of(make_model(name), images).digest for name in ("residual", "attention")}
    assert digests == {
        "residual": "0c07be85b241a2213e46025d0f95409c2e1868845f5dfb2ae6d27d7da38536ca",
        "attention": "683357d66646d47dd1848d6b6ee3ad7734a39ced9ca0d6f0d5bdd85b5b166a8c",
    }


def test_the_digest_tells_sizes_and_members_apart_and_ignores_order(make_model: Make, images: Tensor) -> None:
    layout = layout_of(make_model("residual"), images)
    assert Layout(layout.groups[::-1], ()).digest == layout.digest
    assert Layout(layout.groups[1:], layout.frozen).digest != layout.digest


def test_json_both_ways(make_model: Make, images: Tensor) -> None:
    layout = layout_of(make_model("branches"), images)
    again = Layout.from_json(layout.to_json())
    assert again == layout
    assert again.digest == layout.digest


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"groups": [{"name": "a"}], "frozen": []}'])
def test_text_that_is_no_layout_is_refused(text: str) -> None:
    with pytest.raises(GraphError, match="no layout"):
        Layout.from_json(text)


def test_the_table_names_groups_and_reasons(make_model: Make, images: Tensor) -> None:
    table = layout_of(make_model("attention"), images).table()
    assert "qkv:head" in table
    assert "layer normalisation" in table


def test_an_unknown_group_is_refused(make_model: Make, images: Tensor) -> None:
    with pytest.raises(PlanError, match="no group called 'nothing'"):
        layout_of(make_model("residual"), images).group("nothing")
