"""Holding long work back while the board is hot, so that the line process beside it is not slowed down."""

from __future__ import annotations

import time
from collections.abc import Callable

from kiridashi_agent.machine import hottest_celsius

CHECK_S = 1.0
COOLER_BY = 5.0
"""Work goes on when the board is this much below the limit, °C; at the limit itself it would only flutter."""
LONGEST_PAUSE_S = 120.0


class Thermostat:
    """Pauses work above a limit of temperature.

    Args:
        limit: °C.
        read: the board's highest temperature, ``None`` without a sensor.
        clock, sleep: seconds.

    Attributes:
        paused_s: how long work was held back.
        highest: the highest temperature seen, ``None`` without a sensor.
    """

    def __init__(
        self,
        limit: float,
        read: Callable[[], float | None] = hottest_celsius,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._limit, self._read, self._clock, self._sleep = limit, read, clock, sleep
        self._next_look = 0.0
        self.paused_s = 0.0
        self.highest: float | None = None

    def may_go_on(self, deadline: float) -> bool:
        """Wait while it is too hot; false if it stays so for two minutes, or until ``deadline`` on the clock."""
        if self._clock() < self._next_look:
            return True
        begun, threshold = self._clock(), self._limit
        while True:
            now, celsius = self._clock(), self._look()
            self._next_look = now + CHECK_S
            if celsius is None or celsius <= threshold:
                return True
            threshold = self._limit - COOLER_BY
            if now >= deadline or now - begun >= LONGEST_PAUSE_S:
                return False
            self._sleep(CHECK_S)
            self.paused_s += self._clock() - now

    def _look(self) -> float | None:
        celsius = self._read()
        if celsius is not None:
            self.highest = celsius if self.highest is None else max(self.highest, celsius)
        return celsius
