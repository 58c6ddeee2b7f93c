"""A/B slots: two places for a line's bundle on a device, and the pointer that says which one is active.

``<state>/lines/<line>/{a,b}/`` hold a manifest and its files, ``tuned/`` inside a slot the locally tuned ones;
``active.json`` is the pointer, replaced atomically. One process writes (the agent), any number read, and reading
needs no agent. ``bench/`` is where the active bundle is tuned again; what is good moves from there into the slot that
does not serve. Nothing here imports numpy.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal, get_args

import msgspec

from kiridashi.artifacts import MANIFEST_NAME, remove, set_aside, sweep, sync_folder, write_atomic
from kiridashi.errors import StateError
from kiridashi.messages import check_name
from kiridashi.runtime.protocol import Provider

DEFAULT_STATE_DIR = "/var/lib/kiridashi"
STATE_VARIABLE = "KIRIDASHI_STATE"
TUNED_NAME = "tuned"
TUNING_NAME = "tuned.part"
POINTER_NAME = "active.json"
MAX_POINTER_BYTES = 16 * 1024

Slot = Literal["a", "b"]
Place = Literal["a", "b", "bench"]
BENCH: Place = "bench"


class Active(msgspec.Struct, frozen=True):
    """Which model of a line serves: the slot, the artifact's file name, and the model's digest.

    ``model_digest`` is the manifest's digest, or with ``tuned`` the seal's. ``providers`` and ``threads`` are those the
    agent measured it with; empty and 0 where it was not the agent who chose it.
    """

    slot: Slot
    artifact: str
    model_digest: str
    tuned: bool = False
    providers: tuple[Provider, ...] = ()
    threads: int = 0


class Pointer(msgspec.Struct, frozen=True):
    """The content of ``active.json``."""

    active: Active
    previous: Active | None = None
    format: Literal["kiridashi-active/1"] = "kiridashi-active/1"


def default_state_dir() -> Path:
    """``$KIRIDASHI_STATE``, else ``/var/lib/kiridashi``."""
    return Path(os.environ.get(STATE_VARIABLE) or DEFAULT_STATE_DIR)


class LineSlots:
    """The slots of one line.

    Raises:
        InputError: the line's name is not a safe name.
    """

    def __init__(self, state_dir: Path, line: str) -> None:
        self.line = check_name(line, "line")
        self.root = state_dir / "lines" / line

    @property
    def pointer_path(self) -> Path:
        """The file whose replacement makes another model active."""
        return self.root / POINTER_NAME

    def folder(self, slot: Place) -> Path:
        """The folder of a slot, or of the bench."""
        return self.root / slot

    def model_path(self, active: Active) -> Path:
        """The model file that ``active`` names."""
        folder = self.folder(active.slot)
        return (folder / TUNED_NAME if active.tuned else folder) / active.artifact

    def active(self) -> Active | None:
        """What serves now, ``None`` before the first activation.

        Raises:
            StateError: the pointer is damaged.
        """
        pointer = self._read()
        return pointer.active if pointer else None

    def served(self) -> Active:
        """What serves now.

        Raises:
            StateError: nothing does, or the pointer is damaged. Names the lines that have a model here.
        """
        active = self.active()
        if active is not None:
            return active
        others = sorted(path.parent.name for path in self.root.parent.glob(f"*/{POINTER_NAME}"))
        if others:
            step = f"lines with a model here: {', '.join(others)}"
        elif self.root.parent.is_dir():
            step = "run kiridashi-agent run until the line is active; kiridashi-agent status shows where it is"
        else:
            step = f"name the device's state folder with --state or ${STATE_VARIABLE}"
        why = f"{self.pointer_path} does not exist"
        raise StateError(f"line '{self.line}' has no active model", why=why, next_step=step)

    def previous(self) -> Active | None:
        """What :meth:`rollback` would make active, ``None`` if there is nothing.

        Raises:
            StateError: the pointer is damaged.
        """
        pointer = self._read()
        return pointer.previous if pointer else None

    def inactive_slot(self) -> Slot:
        """The slot that a new bundle goes to.

        Raises:
            StateError: the pointer is damaged.
        """
        active = self.active()
        return "b" if active is not None and active.slot == "a" else "a"

    def prepare(self, slot: Slot) -> Path:
        """Empty a slot that is not active and return its folder.

        A pointer to the slot as the previous model is given up first, so that a power cut in between never leaves
        a way back to an empty slot.

        Raises:
            StateError: the slot is active, or the pointer is damaged.
        """
        pointer = self._read()
        if pointer is not None and pointer.active.slot == slot:
            raise StateError(f"slot {slot} of line '{self.line}' is active and cannot be emptied")
        if pointer is not None and pointer.previous is not None and pointer.previous.slot == slot:
            self._write(Pointer(active=pointer.active))
        folder = self.folder(slot)
        trash = self._trash(slot)
        remove(trash)
        if folder.is_symlink() or folder.exists():
            folder.replace(trash)
            remove(trash)
        folder.mkdir(parents=True)
        sync_folder(self.root)
        return folder

    def activate(self, active: Active) -> None:
        """Make a model serve. The one before stays as :meth:`previous`, until its slot is prepared again.

        Raises:
            StateError: the slot lacks its manifest or the file, or the pointer is damaged. Nothing has changed.
        """
        self._check(active)
        pointer = self._read()
        if pointer is not None and pointer.active == active:
            return
        self._write(Pointer(active=active, previous=pointer.active if pointer else None))

    def rollback(self) -> Active:
        """Make the previous model serve again and return it; a second rollback has nowhere to go.

        Raises:
            StateError: there is no previous model, its files are gone, or the pointer is damaged.
        """
        previous = self.previous()
        if previous is None:
            raise StateError(f"line '{self.line}' has no previous model to go back to")
        self._check(previous)
        self._write(Pointer(active=previous))
        return previous

    def restore(self, active: Active | None) -> None:
        """Write the pointer anew, whatever stands in its place; ``None`` only sets that aside.

        Raises:
            StateError: the slot lacks its manifest or the file. Nothing has changed.
        """
        if active is not None:
            self._check(active)
        if self.pointer_path.exists():
            set_aside(self.pointer_path)
        if active is not None:
            self._write(Pointer(active=active))

    def sweep(self) -> None:
        """Remove what killed processes left half done. Only while nothing works on the line."""
        slots: tuple[Slot, ...] = get_args(Slot)
        for folder in (self.root, *map(self.folder, slots)):
            sweep(folder)
        for slot in slots:
            remove(self._trash(slot))
            remove(self.folder(slot) / TUNING_NAME)

    def _trash(self, slot: Slot) -> Path:
        return self.root / f".{slot}.trash"

    def lay_on_bench(self, slot: Slot) -> Path:
        """Lay a slot's bundle, without what was tuned, on the emptied bench and return its folder.

        Files are linked where the file system can: they are replaced, never written into, so nothing is shared by it.
        Raises OSError.
        """
        bench = self.clear_bench()
        bench.mkdir(parents=True)
        for path in sorted(self.folder(slot).iterdir()):
            if path.is_file():
                _link(path, bench / path.name)
        return bench

    def clear_bench(self) -> Path:
        """Take away what is on the bench, if anything, and return its folder. Raises OSError."""
        bench = self.folder(BENCH)
        remove(bench)
        return bench

    def take_bench(self, slot: Slot) -> None:
        """Move the bench into a slot that is not active; if it has been moved already, nothing happens.

        Raises:
            StateError: the slot is active, or the pointer is damaged.
        """
        if self.folder(BENCH).is_dir():
            self.prepare(slot).rmdir()
            self.folder(BENCH).replace(self.folder(slot))
            sync_folder(self.root)

    def _check(self, active: Active) -> None:
        if Path(active.artifact).name != active.artifact or active.artifact in ("", ".", ".."):
            raise StateError(f"'{active.artifact}' is not a plain file name")
        for path in (self.folder(active.slot) / MANIFEST_NAME, self.model_path(active)):
            if not path.is_file():
                raise StateError(f"slot {active.slot} of line '{self.line}' is not complete", why=f"{path} is missing")

    def _read(self) -> Pointer | None:
        try:
            data = self.pointer_path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            what, step = f"the active pointer {self.pointer_path} cannot be read", "check whose the state folder is"
            raise StateError(what, why=str(error), next_step=step) from error
        if len(data) > MAX_POINTER_BYTES:
            raise self._damaged(f"it is over {MAX_POINTER_BYTES} bytes")
        try:
            pointer = msgspec.json.decode(data, type=Pointer)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise self._damaged(str(error)) from error
        for active in filter(None, (pointer.active, pointer.previous)):
            if Path(active.artifact).name != active.artifact or not active.artifact.strip("."):
                raise self._damaged(f"'{active.artifact}' is not a plain file name")
        return pointer

    def _write(self, pointer: Pointer) -> None:
        write_atomic(self.pointer_path, msgspec.json.encode(pointer, order="sorted"))

    def _damaged(self, why: str) -> StateError:
        return StateError(
            f"the active pointer {self.pointer_path} cannot be read",
            why=why,
            next_step="start kiridashi-agent run again: it writes the pointer anew from its journal",
        )


def _link(source: Path, destination: Path) -> None:
    try:
        os.link(source, destination)
    except OSError:  # a file system without links
        shutil.copyfile(source, destination)
