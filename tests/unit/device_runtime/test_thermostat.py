"""Holding work back while it is hot, with a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from kiridashi_agent.gate import SIGNIFICANCE, chance_of_loss, smallest_refused_loss
from kiridashi_agent.machine import hottest_celsius
from kiridashi_agent.thermostat import LONGEST_PAUSE_S, Thermostat


class Board:
    """A board whose temperature is a function of time, which passes only by sleeping."""

    def __init__(self, celsius: Callable[[float], float | None]) -> None:
        self.now, self.celsius, self.looks = 0.0, celsius, 0

    def thermostat(self, limit: float = 70.0) -> Thermostat:
        return Thermostat(limit, self.read, lambda: self.now, self.sleep)

    def read(self) -> float | None:
        self.looks += 1
        return self.celsius(self.now)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_it_waits_until_the_board_is_clearly_cooler() -> None:
    board = Board(lambda now: 80.0 - now)
    thermostat = board.thermostat()
    assert thermostat.may_go_on(1000.0)
    assert board.now == 15.0  # not already at 70
    assert (thermostat.paused_s, thermostat.highest) == (15.0, 80.0)


@pytest.mark.parametrize(("deadline", "ends"), [(30.0, 30.0), (10_000.0, LONGEST_PAUSE_S)])
def test_it_gives_up_when_it_stays_hot(deadline: float, ends: float) -> None:
    board = Board(lambda _: 71.0)
    assert not board.thermostat().may_go_on(deadline)
    assert board.now == ends


def test_below_the_limit_and_without_a_sensor_it_only_looks_once_a_second() -> None:
    for celsius in (69.9, None):
        board = Board(lambda _, celsius=celsius: celsius)
        thermostat = board.thermostat()
        for _ in range(100):
            assert thermostat.may_go_on(10.0)
        assert board.looks == 1
        assert (thermostat.paused_s, thermostat.highest) == (0.0, celsius)


def test_the_hottest_zone_counts_and_none_is_none(tmp_path: Path) -> None:
    assert hottest_celsius(tmp_path) is None
    for number, text in enumerate(["41500\n", "67250\n", "broken"]):
        zone = tmp_path / "sys/class/thermal" / f"thermal_zone{number}"
        zone.mkdir(parents=True)
        (zone / "temp").write_text(text)
    assert hottest_celsius(tmp_path) == 67.25


@pytest.mark.parametrize(
    ("count", "drop", "wanted"), [(4, 0.1, None), (5, 0.1, 5), (20, 0.1, 5), (100, 0.1, 11), (9, 1.0, None)]
)
def test_the_smallest_loss_that_the_gate_refuses(count: int, drop: float, wanted: int | None) -> None:
    assert smallest_refused_loss(count, drop) == wanted
    if wanted is not None:
        assert chance_of_loss(wanted, 0) < SIGNIFICANCE
