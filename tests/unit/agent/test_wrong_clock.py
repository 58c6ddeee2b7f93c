"""Devices without a battery for their clock: it is wrong by years at the start, and right some time later."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

from kiridashi_agent import metadata

V1, V2 = "lines/press-3/1.json", "lines/press-3/2.json"


def floor_s(device) -> float:
    return metadata.clock_floor_s(device.state / "trust" / "metadata")


def test_in_1970_an_update_waits_and_goes_on_when_the_clock_is_set(serving, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(metadata.time, "time", lambda: 3600.0)
        serving.transport.want(2, press_3=V2)
        serving.agent.tick(0)
        assert (serving.line.phase, serving.line.error.kind, serving.line.slot) == ("fetching", "ClockError", "a")
        assert "clock went back" in serving.line.error.message
    assert serving.settle().phase == "active"
    assert serving.line.target == V2


def test_years_ahead_an_update_is_refused_and_nothing_of_it_is_remembered(serving, fleet) -> None:
    """To a clock that is ahead, signatures look as these do: run out."""
    before = floor_s(serving)
    fleet.commit(expires=datetime.now(UTC).replace(microsecond=0) - timedelta(days=900))
    serving.transport.want(2, press_3=V2)
    state = serving.settle()
    assert (state.phase, state.error.kind, state.slot) == ("rejected", "TrustError", "a")
    assert "clock" in state.error.message or "expired" in state.error.message
    assert floor_s(serving) == before <= time.time()
    fleet.commit()
    serving.transport.want(3, press_3=V2)
    assert serving.settle().phase == "active"


def test_waiting_needs_no_clock_on_the_wall(device, monkeypatch) -> None:
    """The time between two attempts is measured by a clock that cannot be set."""
    device.transport.offline = True
    device.transport.want(1, press_3=V1)
    device.agent.tick(0)
    assert device.line.phase == "fetching"
    jumps = iter((0.0, 4e9, 0.0) * 1000)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: next(jumps))
        for _ in range(3):
            device.agent.tick(0.02)
    assert device.line.phase == "fetching"
    device.transport.offline = False
    assert device.settle().phase == "active"
