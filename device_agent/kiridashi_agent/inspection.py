"""Is what serves still what was activated? Looked at when the agent starts, and then once a day.

A disk that lost bytes or a file that somebody edited does no harm to line processes that run: they have the model in
memory. The next one to start would refuse the file. So the agent looks first: a lost pointer is written anew from the
journal, and a damaged model is fetched again into the other slot, as if it had been wanted anew. Where it cannot be
fetched, the previous model serves meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import msgspec
from kiridashi.artifacts import MANIFEST_NAME, check_file, is_shortage
from kiridashi.config import LineSection
from kiridashi.errors import KiridashiError, StateError, TrustError
from kiridashi.manifest import decode_manifest
from kiridashi.slots import TUNED_NAME, Active, LineSlots, Slot

from kiridashi_agent.actions import with_active, with_error
from kiridashi_agent.journal import LineRecord
from kiridashi_agent.lifecycle import advance
from kiridashi_agent.trust_child import NoResultError

_LOG = logging.getLogger(__name__)
CheckSeal = Callable[[Path, str, str, str], None]
_replace = msgspec.structs.replace


def inspected(record: LineRecord, slots: LineSlots, section: LineSection, check_seal: CheckSeal) -> LineRecord:
    """The record of a resting line, true about what serves: the same object when it was already.

    Args:
        record: as the journal has it; what it says of the serving model is believed where the pointer is lost.
        slots: of the line; its pointer is mended.
        section: the line's settings, with which a lost pointer is written.
        check_seal: checks a tuned file; takes the folder, the file's name, and the digests of parent and seal.

    Raises:
        OSError: the system was short of something, or the pointer cannot be written; nothing is known of the files.
    """
    active, trouble = _pointed_to(record, slots, section)
    if active is None:
        return record if trouble is None else with_error(record, trouble)
    told = with_active(record, active)
    found = damage(slots, active, check_seal)
    if found is not None:
        trouble = StateError(
            f"the model that line '{slots.line}' serves was damaged on the disk",
            why=f"{found}; lines that run have it in memory, new ones cannot load it",
        )
    if trouble is not None:
        told = with_error(told, trouble)
        _LOG.error("line=%s %s", slots.line, trouble)
    if found is not None and told.state.phase == "active":
        step = advance(told.state.phase, "desired")
        told = _replace(told, state=_replace(told.state, phase=step.phase), attempts=0)
    told = _replace(told, damaged=found is not None)
    return record if told == record else told


def fallen_back(record: LineRecord, slots: LineSlots, check_seal: CheckSeal) -> LineRecord:
    """The record once the previous model serves in place of the damaged one that cannot be fetched now.

    Where there is no sound previous model nothing changes: lines that run have the damaged one in memory.
    """
    try:
        previous = slots.previous()
        found = None if previous is None else damage(slots, previous, check_seal)
        if previous is None or found is not None:
            why = found or "there is none"
            _LOG.warning("line=%s the previous model cannot take the place of the damaged one: %s", slots.line, why)
            return record
        active = slots.rollback()
    except (StateError, OSError) as error:
        _LOG.error("line=%s the previous model cannot take the place of the damaged one now: %s", slots.line, error)
        return record
    _LOG.error("line=%s serves the previous model until the damaged one can be fetched again", slots.line)
    return _replace(with_active(record, active), damaged=False)


def _pointed_to(
    record: LineRecord, slots: LineSlots, section: LineSection
) -> tuple[Active | None, KiridashiError | None]:
    """What serves, and what was wrong with the pointer if it had to be mended."""
    served = _served(record, section)
    try:
        active = slots.active()
        if active is not None or served is None:
            return active, None
        why = f"{slots.pointer_path} was gone"
    except StateError as error:
        if isinstance(error.__cause__, OSError) and is_shortage(error.__cause__):
            raise error.__cause__ from None
        why = str(error)
    try:
        slots.restore(served)
    except StateError as error:
        slots.restore(None)
        served, why = None, f"{why}; {error}"
    mended = "nothing serves" if served is None else "it was written anew from the journal"
    return served, StateError(f"line '{slots.line}' had lost the pointer to its model: {mended}", why=why)


def _served(record: LineRecord, section: LineSection) -> Active | None:
    """What the journal says that serves."""
    state = record.state
    slot: Slot | None = "a" if state.slot == "a" else "b" if state.slot == "b" else None
    if slot is None:
        return None
    return Active(slot, state.artifact, state.model_digest, state.tuned, section.providers, section.threads)


def damage(slots: LineSlots, active: Active, check_seal: CheckSeal) -> KiridashiError | None:
    """What is wrong with the files that ``active`` names."""
    folder = slots.folder(active.slot)
    path = folder / MANIFEST_NAME
    try:
        manifest = decode_manifest(path.read_bytes(), str(path))
        artifact = manifest.artifact(active.artifact)
        if active.tuned:
            check_seal(folder / TUNED_NAME, artifact.name, manifest.digest, active.model_digest)
        elif manifest.digest != active.model_digest:
            raise TrustError(f"{path} is not the manifest that was activated")
        else:
            check_file(folder / artifact.name, artifact)
    except NoResultError as error:  # killed for memory or time, say: the file may be as sound as ever
        _LOG.warning("line=%s the seal could not be checked, and is looked at later: %s", slots.line, error)
    except KiridashiError as error:
        return error
    except OSError as error:
        if is_shortage(error):
            raise
        return StateError(f"{folder} cannot be read", why=str(error))
    return None
