"""The drift watch as a child process: takes what the lines have noted, moves the watches on, asks for names.

State and files are in step whatever happens: the state that is written names the files that are in it, and they are
removed afterwards. A state that cannot be read is set aside, and the watch begins anew.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
from kiridashi.artifacts import MANIFEST_NAME, check_file, write_atomic
from kiridashi.drift.report import MAX_EXAMPLES, Finding, LineDrift
from kiridashi.drift.rows import Row, RowFolder, decode_reference
from kiridashi.drift.statistics import NAMES, frame_statistics
from kiridashi.drift.watch import WatchState, advanced, new_watch, shows, summary
from kiridashi.errors import BundleError, KiridashiError
from kiridashi.manifest import Manifest, decode_manifest
from kiridashi.slots import Active, LineSlots
from kiridashi.spool import AnswerLog, Frame, SpoolFolder

from kiridashi_agent.jobs import WatchOutcome, WatchRequest

Request = WatchRequest
MAX_FILES = 64
MAX_WAITING = 32
MAX_LOOKS = 96
_LOG = logging.getLogger(__name__)


class Kept(msgspec.Struct, frozen=True):
    """A line's state on disk; ``taken`` are the files whose rows are in it."""

    state: WatchState
    taken: tuple[str, ...] = ()


def run(request: WatchRequest) -> WatchOutcome:
    """Move the watch of every line on; what goes wrong with one line does not stop the others."""
    found: dict[str, LineDrift] = {}
    failed: dict[str, str] = {}
    for line, wanted in request.lines.items():
        try:
            drift = _watch_line(Path(request.state_dir), line, wanted)
        except (KiridashiError, OSError) as error:
            failed[line] = str(error)
        else:
            if drift is not None:
                found[line] = drift
    return WatchOutcome(found, failed)


def state_path(state_dir: Path, line: str) -> Path:
    """Where the watch of a line is kept."""
    return state_dir / "drift" / f"{line}.json"


def _watch_line(state_dir: Path, line: str, wanted: int) -> LineDrift | None:
    slots = LineSlots(state_dir, line)
    active = slots.active()
    if active is None:
        return None
    folder = slots.folder(active.slot)
    manifest = decode_manifest((folder / MANIFEST_NAME).read_bytes(), str(folder / MANIFEST_NAME))
    path, rows = state_path(state_dir, line), RowFolder(state_dir, line)
    kept = _read(path)
    if kept is None or kept.state.digest != active.model_digest:
        server = _server_rows(folder, manifest)
        kept = Kept(new_watch(active.model_digest, manifest.labels, server, wanted, tuned=active.tuned))
    rows.remove(kept.taken)  # of a look that was killed; the state on the disk names them until they are gone
    before = kept.state.findings
    names = [name for name in rows.names() if name not in kept.taken][:MAX_FILES]
    state = advanced(kept.state, _rows(rows, names, active, len(manifest.labels)))
    size = (manifest.preprocessing.height, manifest.preprocessing.width)
    new = tuple(_with_examples(finding, state, state_dir, line, size) for finding in state.findings[len(before) :])
    state = msgspec.structs.replace(state, findings=(*before, *new))
    write_atomic(path, msgspec.json.encode(Kept(state, tuple(names))), mode=0o600)
    rows.remove(names)
    return summary(state)


def _read(path: Path) -> Kept | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Kept)
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        aside = path.with_name(path.name + ".damaged")
        path.replace(aside)
        _LOG.error("the watch %s was damaged (%s); set aside as %s", path, error, aside.name)
        return None


def _server_rows(folder: Path, manifest: Manifest) -> tuple[Row, ...]:
    """The bundle's reference; nothing if it has none that this program knows."""
    artifact = manifest.of_kind("drift-reference")
    if artifact is None or not (folder / artifact.name).is_file():
        return ()
    check_file(folder / artifact.name, artifact)
    reference = decode_reference((folder / artifact.name).read_bytes(), artifact.name)
    if any(row.best >= len(manifest.labels) for row in reference.rows):
        raise BundleError(f"{artifact.name} has classes that the bundle does not have")
    return reference.rows if reference.names == NAMES else ()


def _rows(folder: RowFolder, names: Sequence[str], active: Active, classes: int) -> list[Row]:
    """The rows of the active model, in the order of time."""
    found: list[Row] = []
    for name in names:
        file = folder.read(name)
        if file is not None and file.digest == active.model_digest and file.names == NAMES:
            found += [row for row in file.rows if row.best < classes]
    return found


def _with_examples(finding: Finding, state: WatchState, state_dir: Path, line: str, size: tuple[int, int]) -> Finding:
    """Claim frames that show the change: whatever is claimed and not answered, the label page shows first."""
    folder = SpoolFolder(state_dir, line)
    if finding.reference != "line" or not folder.frames.is_dir():
        return finding
    answered = {answer.entry for answer in AnswerLog(folder.answers_path).answers()}
    waiting = sum(1 for place in folder.scan(folder.answered) if place.name not in answered)
    places = sorted(folder.scan(folder.frames), key=lambda place: -place.clock_s)[:MAX_LOOKS]
    ranked = []
    for place in places:
        frame = folder.read(folder.frames / place.name)
        if frame is not None and frame.header.time_s >= finding.since_s and frame.header.digest == state.digest:
            ranked.append((_shows(finding, state, frame, size), place.kind == "random", 1 - frame.header.margin, place))
    ranked.sort(key=lambda item: item[:3], reverse=True)
    room = max(0, min(MAX_EXAMPLES, MAX_WAITING - waiting))
    claimed = [place.name for *_, place in ranked[:room] if folder.claim(place)]
    return msgspec.structs.replace(finding, examples=tuple(claimed))


def _shows(finding: Finding, state: WatchState, frame: Frame, size: tuple[int, int]) -> bool:
    header = frame.header
    pixels = np.frombuffer(frame.pixels, np.uint8).reshape(header.height, header.width, 3)
    values = np.array(header.values, np.float32)
    if len(values) != len(state.labels):
        return False
    numbers = frame_statistics(pixels, values, size)
    return shows(state, finding, Row(header.time_s, int(values.argmax()), tuple(numbers.tolist())))
