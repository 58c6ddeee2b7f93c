"""The transition table: complete, reachable, and without a loop that makes no progress."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kiridashi.errors import StateError
from kiridashi_agent.lifecycle import EVENTS, PHASES, RESTING, TABLE, Event, advance, resume

WORKING = tuple(phase for phase in PHASES if phase not in RESTING)
# These come from outside: without one of them, every path must end.
EXTERNAL = {"desired", "undone", "retry"}


def test_every_phase_can_be_reached_from_idle() -> None:
    reached, fresh = {"idle"}, ["idle"]
    while fresh:
        phase = fresh.pop()
        for (source, _), step in TABLE.items():
            if source == phase and step.phase not in reached:
                reached.add(step.phase)
                fresh.append(step.phase)
    assert reached == set(PHASES)


@pytest.mark.parametrize(("phase", "event"), list(itertools.product(PHASES, EVENTS)))
def test_a_pair_is_either_in_the_table_or_raises(phase, event) -> None:
    if (phase, event) in TABLE:
        assert advance(phase, event).phase in PHASES
    else:
        with pytest.raises(StateError, match=f"'{event}' cannot happen while a line is '{phase}'"):
            advance(phase, event)


def test_everywhere_a_new_target_can_be_taken_and_a_bad_one_refused() -> None:
    assert all(advance(phase, "desired").phase == "fetching" for phase in PHASES)
    assert all(advance(phase, "refused").phase == "rejected" for phase in WORKING)


def test_no_cycle_without_an_event_from_outside() -> None:
    edges = {(a, step.phase) for (a, event), step in TABLE.items() if event not in EXTERNAL and step.action != "wait"}
    phases = list(PHASES)
    while True:  # peel off phases that lead nowhere; what cannot be peeled is a cycle
        ends = [phase for phase in phases if not any(a == phase and b in phases for a, b in edges)]
        if not ends:
            break
        phases = [phase for phase in phases if phase not in ends]
    assert phases == []


def test_only_activating_leads_to_active_and_it_must_have_been_validated() -> None:
    assert {key for key, step in TABLE.items() if step.phase == "active"} == {("activating", "activated")}
    assert {key for key, step in TABLE.items() if step.phase == "activating"} == {("validating", "validated")}


def test_working_phases_resume_with_their_own_action_and_resting_ones_with_none() -> None:
    assert all(resume(phase) == "none" for phase in RESTING)
    for phase in WORKING:
        entering = {step.action for step in TABLE.values() if step.phase == phase and step.action != "wait"}
        assert entering == {resume(phase)}


@given(st.lists(st.sampled_from(EVENTS), max_size=40))
def test_any_order_of_events_keeps_the_invariants(events: list[Event]) -> None:
    phase, measured = "idle", False
    for event in events:
        try:
            step = advance(phase, event)
        except StateError:
            continue
        if event == "desired":
            measured = False
        measured = measured or event in ("chosen", "chosen-for-tuning")
        phase = step.phase
        assert phase not in ("validating", "activating") or measured
        assert (step.action in ("none", "discard")) == (phase in RESTING)
