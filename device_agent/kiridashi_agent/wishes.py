"""What a wish makes of a line's record: the server's, and that of a person who brings a bundle. Pure."""

from __future__ import annotations

import msgspec
from kiridashi.errors import InputError
from kiridashi.messages import LineDesired, LineState

from kiridashi_agent.actions import with_error
from kiridashi_agent.journal import LineRecord
from kiridashi_agent.lifecycle import RESTING, advance

# Refusals that say nothing about the model itself: a later generation may try the same target again.
_RETRIED_KINDS = frozenset({"TrustError", "NotFoundError", "RefusedError", "StateError"})
_replace = msgspec.structs.replace


def adopted(record: LineRecord, wanted: LineDesired, generation: int, *, configured: bool) -> LineRecord:
    """The line's record once ``wanted`` is taken: the same object when nothing changes. Pure.

    A target that was refused for reasons outside the model is tried again with a later generation; one that was
    refused for itself, or undone by hand, only when its rollout is another. The wish that an import went over is none
    any more; another one is.
    """
    state = record.state
    if (wanted.target, wanted.rollout) == (record.imported_over, record.rollout):
        return record
    failed_outside = state.error is not None and state.error.kind in _RETRIED_KINDS
    again = (state.phase in ("rejected", "rolled-back") and wanted.rollout != record.rollout) or (
        state.phase == "rejected" and failed_outside and generation > record.generation
    )
    if wanted.target == state.target and not again:
        if record.imported_over is None:
            return record
        return _replace(record, generation=generation, rollout=wanted.rollout, imported_over=None)
    begun = _begun(state, wanted.target)
    taken = LineRecord(state=begun, generation=generation, rollout=wanted.rollout, damaged=record.damaged)
    if configured:
        return taken
    error = InputError(
        "a model was wanted for a line that is not in this device's configuration",
        next_step="add the line's section to config.toml, or enrol the device for that line",
    )
    refused = with_error(taken, error)
    return _replace(refused, state=_replace(refused.state, phase=advance("fetching", "refused").phase))


def imported(record: LineRecord, target: str) -> LineRecord:
    """The line's record once a person has brought ``target``: as it is when the line works on that already. Pure."""
    if target == record.state.target and record.state.phase not in RESTING:
        return record
    over = record.state.target if record.imported_over is None else record.imported_over
    begun = _begun(record.state, target)
    return LineRecord(
        state=begun,
        generation=record.generation,
        rollout=record.rollout,
        imported_over=over,
        damaged=record.damaged,
    )


def _begun(state: LineState, target: str) -> LineState:
    """On the way to ``target``; what serves stays."""
    return LineState(
        phase=advance(state.phase, "desired").phase,
        target=target,
        slot=state.slot,
        artifact=state.artifact,
        model_digest=state.model_digest,
        tuned=state.tuned,
    )
