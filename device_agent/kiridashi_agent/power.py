"""Energy, where a board measures it: a counter in joules, or sensors of power that are looked at again and again.

Known are the rails of Jetson boards (INA3221, read through hwmon or the older ``iio`` files), other power monitors
under hwmon (INA2xx, ACPI), and the energy counters of x86 processors (RAPL). A board's own rail goes before the
processor's counter: it includes memory and GPU. What is measured is everything on the rail, whoever caused it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kiridashi_agent.board import read, whole

_ROOT = Path("/")
LOOK_S = 0.1
"""Between two looks at a sensor of power: it needs a millisecond, and the sensors average over longer."""
# What boards call the rail that feeds everything; without one of these the rails are added up.
_WHOLE_BOARD = ("VDD_IN", "POM_5V_IN", "VIN", "POM_IN", "SYS_VIN")
_POWER_CHIPS = ("ina219", "ina220", "ina226", "ina230", "ina231", "ina238", "ina260", "power_meter")


@dataclass(frozen=True)
class Counter:
    """Energy that has been used since some start, joules; ``wraps_j`` is where the counter begins again."""

    name: str
    joules: Callable[[], float | None]
    wraps_j: float


@dataclass(frozen=True)
class Sensor:
    """Power at this moment, watts; ``None`` while it cannot be read."""

    name: str
    watts: Callable[[], float | None]


class Meter:
    """Adds up the energy of one stretch of time. Made by :func:`find_meter`.

    Attributes:
        source: what is measured, in words.
    """

    def __init__(self, source: str, counters: tuple[Counter, ...], sensors: tuple[Sensor, ...], now: float) -> None:
        self.source = source
        self._counters, self._sensors = counters, sensors
        self._last = [counter.joules() for counter in counters]
        self._watts = self._power()
        self._begun = self._looked = now
        self._joules = 0.0
        self._broken = None in self._last or (bool(sensors) and self._watts is None)

    def look(self, now: float, *, at_once: bool = False) -> None:
        """Add what was used since the last look, if that is :data:`LOOK_S` ago."""
        if now - self._looked < LOOK_S and not at_once:
            return
        for n, counter in enumerate(self._counters):
            before, value = self._last[n], counter.joules()
            if before is None or value is None:
                self._broken = True
                continue
            self._joules += value - before if value >= before else value - before + counter.wraps_j
            self._last[n] = value
        watts = self._power()
        if self._sensors and watts is None:
            self._broken = True
        elif watts is not None and self._watts is not None:
            self._joules += (watts + self._watts) / 2 * (now - self._looked)
        self._watts, self._looked = watts, now

    def joules(self) -> float | None:
        """The energy up to the last look; ``None`` if a reading failed meanwhile, or nothing was used at all."""
        return None if self._broken or self._joules <= 0 else self._joules

    def seconds(self) -> float:
        """From the beginning to the last look."""
        return self._looked - self._begun

    def _power(self) -> float | None:
        readings = [sensor.watts() for sensor in self._sensors]
        known = [watts for watts in readings if watts is not None]
        return sum(known) if known and len(known) == len(readings) else None


def find_meter(now: float, root: Path = _ROOT) -> Meter | None:
    """The best meter of this board, started; ``None`` where the board reports no energy, or not to this account."""
    rails = _jetson_rails(root) or _jetson_rails_before_hwmon(root) or _power_monitors(root)
    for_all = [rail for rail in rails if rail.name.upper().startswith(_WHOLE_BOARD)][:1]
    if for_all:
        return Meter(f"the board's rail {for_all[0].name}, idle power included", (), tuple(for_all), now)
    if rails:
        names = ", ".join(rail.name for rail in rails)
        return Meter(f"the sum of the rails {names}, idle power included", (), tuple(rails), now)
    counters = _rapl(root)
    if counters:
        names = ", ".join(counter.name for counter in counters)
        return Meter(f"the processor's counter {names} (RAPL), idle power included", tuple(counters), (), now)
    return None


def _jetson_rails(root: Path) -> list[Sensor]:
    """INA3221 under hwmon: ``inN_label``, ``inN_input`` in mV, ``currN_input`` in mA (kernel hwmon/ina3221)."""
    rails = []
    for chip in sorted(root.glob("sys/class/hwmon/hwmon*/name")):
        if read(chip) != "ina3221":
            continue
        for n in (1, 2, 3):
            label, folder = read(chip.parent / f"in{n}_label"), chip.parent
            sensor = Sensor(label, _product(folder / f"in{n}_input", folder / f"curr{n}_input"))
            if label and label != "NC" and sensor.watts() is not None:
                rails.append(sensor)
    return rails


def _jetson_rails_before_hwmon(root: Path) -> list[Sensor]:
    """The same chips with the driver of older releases: ``rail_name_N`` and ``in_powerN_input`` in mW."""
    rails = []
    for place in sorted(root.glob("sys/bus/i2c/drivers/ina3221x/*/iio:device*/rail_name_*")):
        number = place.name.rpartition("_")[2]
        sensor = Sensor(read(place), _scaled(place.with_name(f"in_power{number}_input"), 1e-3))
        if sensor.name and sensor.name != "NC" and sensor.watts() is not None:
            rails.append(sensor)
    return rails


def _power_monitors(root: Path) -> list[Sensor]:
    """Other monitors under hwmon: ``power1_input`` or ``power1_average`` in microwatts."""
    found = []
    for chip in sorted(root.glob("sys/class/hwmon/hwmon*/name")):
        name = read(chip)
        places = [path for file in ("power1_input", "power1_average") if (path := chip.parent / file).is_file()]
        if name in _POWER_CHIPS and places:
            sensor = Sensor(read(chip.parent / "power1_label") or name, _scaled(places[0], 1e-6))
            if sensor.watts() is not None:
                found.append(sensor)
    return found


def _rapl(root: Path) -> list[Counter]:
    """The counters of whole packages; ``energy_uj`` is readable to root alone on most systems."""
    counters = []
    for folder in sorted(root.glob("sys/class/powercap/intel-rapl:*")):
        name, wraps = read(folder / "name"), whole(folder / "max_energy_range_uj")
        if folder.name.count(":") == 1 and name.startswith("package") and wraps is not None:
            counter = Counter(name, _scaled(folder / "energy_uj", 1e-6), wraps * 1e-6)
            if counter.joules() is not None:
                counters.append(counter)
    return counters


def _scaled(path: Path, unit: float) -> Callable[[], float | None]:
    def value() -> float | None:
        number = whole(path)
        return None if number is None else number * unit

    return value


def _product(millivolts: Path, milliamperes: Path) -> Callable[[], float | None]:
    def watts() -> float | None:
        volts, amperes = whole(millivolts), whole(milliamperes)
        return None if volts is None or amperes is None else volts * amperes * 1e-6

    return watts
