"""From wanted versions to a desired state."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from kiridashi.messages import Desired, LineDesired, target_path
from kiridashi_server.fleet.desired import desired_for
from kiridashi_server.fleet.records import Release


def _release(line, version):
    return Release(line, version, target_path(line, version), "sha256:0", "2026-01-01T00:00:00+00:00")


def test_a_device_is_told_the_wanted_version_of_each_of_its_lines():
    releases = [_release("press-3", 1), _release("press-3", 2), _release("weld-1", 4)]
    desired = desired_for({"press-3": 1, "weld-1": 4, "paint-9": None}, releases, 7)
    assert desired == Desired(
        generation=7,
        lines={"press-3": LineDesired("lines/press-3/1.json"), "weld-1": LineDesired("lines/weld-1/4.json")},
    )


@given(
    st.dictionaries(st.sampled_from(["a", "b", "c"]), st.none() | st.integers(1, 4)),
    st.sets(st.tuples(st.sampled_from(["a", "b", "c", "d"]), st.integers(1, 4))),
    st.integers(0, 2**40),
)
def test_only_published_wanted_versions_are_told(lines, published, generation):
    desired = desired_for(lines, [_release(*key) for key in sorted(published)], generation)
    assert desired.generation == generation
    assert {(line, entry.target) for line, entry in desired.lines.items()} == {
        (line, target_path(line, version)) for line, version in lines.items() if (line, version) in published
    }
