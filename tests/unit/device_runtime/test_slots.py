from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import kiridashi.slots as module
import pytest
from kiridashi.errors import InputError, StateError
from kiridashi.slots import Active, LineSlots, default_state_dir


def filled(slots: LineSlots, slot: str, digest: str, *, tuned: bool = False) -> Active:
    """A slot with a manifest and a file, activated."""
    folder = slots.prepare(slot)  # type: ignore[arg-type]
    (folder / "manifest.json").write_text("{}")
    (folder / "model.onnx").write_text(digest)
    if tuned:
        (folder / "tuned").mkdir()
        (folder / "tuned" / "model.onnx").write_text(digest + " tuned")
    active = Active(slot=slot, artifact="model.onnx", model_digest=digest, tuned=tuned)  # type: ignore[arg-type]
    slots.activate(active)
    return active


@pytest.fixture
def slots(tmp_path: Path) -> LineSlots:
    return LineSlots(tmp_path, "press-3")


def test_updates_go_back_and_forth_between_two_slots(slots: LineSlots) -> None:
    assert slots.active() is None
    assert slots.inactive_slot() == "a"
    first = filled(slots, "a", "one")
    assert (slots.active(), slots.previous(), slots.inactive_slot()) == (first, None, "b")
    second = filled(slots, "b", "two", tuned=True)
    assert (slots.active(), slots.previous(), slots.inactive_slot()) == (second, first, "a")
    assert slots.model_path(second).read_text() == "two tuned"
    assert LineSlots(slots.root.parent.parent, "press-3").active() == second


def test_rollback_goes_one_step_back_once(slots: LineSlots) -> None:
    first = filled(slots, "a", "one")
    filled(slots, "b", "two")
    assert slots.rollback() == first
    assert slots.active() == first
    with pytest.raises(StateError, match="no previous model"):
        slots.rollback()


def test_activating_the_same_again_keeps_the_way_back(slots: LineSlots) -> None:
    first = filled(slots, "a", "one")
    second = filled(slots, "b", "two")
    slots.activate(second)
    assert slots.previous() == first


def test_the_active_slot_cannot_be_emptied(slots: LineSlots) -> None:
    active = filled(slots, "a", "one")
    with pytest.raises(StateError, match="is active"):
        slots.prepare("a")
    assert slots.model_path(active).read_text() == "one"


def test_power_cut_while_emptying_leaves_no_way_back_to_an_empty_slot(
    slots: LineSlots, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(slots, "a", "one")
    second = filled(slots, "b", "two")

    def cut(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "remove", cut)
    with pytest.raises(KeyboardInterrupt):
        slots.prepare("a")
    monkeypatch.undo()
    assert (slots.active(), slots.previous()) == (second, None)
    assert list(slots.prepare("a").iterdir()) == []


def test_failed_pointer_write_keeps_the_old_model(slots: LineSlots, monkeypatch: pytest.MonkeyPatch) -> None:
    first = filled(slots, "a", "one")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_atomic", full)
        with pytest.raises(OSError, match="No space"):
            filled(slots, "b", "two")
    assert slots.active() == first


@pytest.mark.parametrize("missing", ["manifest.json", "model.onnx"])
def test_incomplete_slot_is_not_activated(slots: LineSlots, missing: str) -> None:
    first = filled(slots, "a", "one")
    folder = slots.prepare("b")
    for name in {"manifest.json", "model.onnx"} - {missing}:
        (folder / name).write_text("x")
    with pytest.raises(StateError, match="not complete"):
        slots.activate(Active(slot="b", artifact="model.onnx", model_digest="two"))
    assert slots.active() == first


def test_no_rollback_to_files_that_are_gone(slots: LineSlots) -> None:
    first = filled(slots, "a", "one")
    second = filled(slots, "b", "two")
    slots.model_path(first).unlink()
    with pytest.raises(StateError, match="not complete"):
        slots.rollback()
    assert slots.active() == second


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"active": {"slot": "a"',
        b'{"active": {"slot": "c", "artifact": "m", "model_digest": "d"}, "format": "kiridashi-active/1"}',
        b'{"active": {"slot": "a", "artifact": "../m", "model_digest": "d"}, "format": "kiridashi-active/1"}',
        b'{"active": {"slot": "a", "artifact": "..", "model_digest": "d"}, "format": "kiridashi-active/1"}',
        b'{"active": {"slot": "a", "artifact": "m", "model_digest": "d"}, "format": "kiridashi-active/2"}',
        b'{"active": {"slot": "a", "artifact": "m\xff", "model_digest": "d"}, "format": "kiridashi-active/1"}',
        b" " * 20_000,
    ],
)
def test_damaged_pointer_says_what_to_do(slots: LineSlots, content: bytes) -> None:
    filled(slots, "a", "one")
    slots.pointer_path.write_bytes(content)
    for read in (slots.active, slots.previous, slots.inactive_slot, slots.rollback, lambda: slots.prepare("b")):
        with pytest.raises(StateError) as caught:
            read()
        assert str(slots.pointer_path) in caught.value.what
        assert "kiridashi-agent run" in caught.value.next_step


@pytest.mark.parametrize("line", ["", "..", "a/b", "Press", "-a", "a" * 64])
def test_unsafe_line_names(tmp_path: Path, line: str) -> None:
    with pytest.raises(InputError):
        LineSlots(tmp_path, line)


def test_emptying_a_slot_that_is_a_link_leaves_the_target_alone(slots: LineSlots, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    slots.root.mkdir(parents=True)
    slots.folder("a").symlink_to(precious)
    slots.prepare("a")
    assert (precious / "file").read_text() == "kept"
    assert not slots.folder("a").is_symlink()


def test_state_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIRIDASHI_STATE", "/srv/kiri")
    assert default_state_dir() == Path("/srv/kiri")
    monkeypatch.delenv("KIRIDASHI_STATE")
    assert default_state_dir() == Path("/var/lib/kiridashi")


def test_the_resident_side_imports_neither_numpy_nor_a_runtime() -> None:
    code = (
        "import sys, kiridashi, kiridashi.slots, kiridashi.trust, kiridashi.runtime, kiridashi_agent.profiling;"
        "kiridashi.runtime.available_runtimes();"
        "print(sorted({'numpy', 'onnxruntime', 'ai_edge_litert', 'torch', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_pointer_of_an_older_agent_names_no_providers(slots: LineSlots) -> None:
    filled(slots, "a", "one")
    pointer = json.loads(slots.pointer_path.read_text())
    del pointer["active"]["providers"], pointer["active"]["threads"]
    slots.pointer_path.write_text(json.dumps(pointer))
    active = slots.active()
    assert active is not None
    assert (active.providers, active.threads) == ((), 0)
