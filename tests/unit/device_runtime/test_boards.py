"""What boards tell of themselves, from recorded trees of ``/proc`` and ``/sys``."""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from kiridashi_agent.board import Moment, between, look
from kiridashi_agent.gpu_memory import GpuPeak, gpu_bytes
from kiridashi_agent.machine import description, hardware_kind, virtual_machine
from kiridashi_agent.power import Meter, Sensor, find_meter

from tests.assets import boards


def test_a_raspberry_pi_that_gets_hot(tmp_path: Path) -> None:
    before = replace(look(boards.build(tmp_path, boards.PI_4)), seconds=10.0, own_s=1.0, preempted=5)
    assert (before.mhz, before.celsius, before.capped) == (1800.0, 61.322, {})
    after = replace(look(boards.build(tmp_path, boards.PI_4_LATER_AND_HOT)), seconds=14.0, own_s=2.0, preempted=8)
    found = between(before, after, tmp_path)
    ticks = os.sysconf("SC_CLK_TCK")
    assert found.others == pytest.approx((300 / ticks - 1.0) / 4)
    assert (found.seconds, found.stolen, found.preempted) == (4.0, 0.0, 3)
    assert found.mhz == (1800.0, 1200.0)
    assert found.celsius == (61.322, 82.764)
    assert found.governor == "ondemand"
    # Bit 3 is on now; bits 17 and 19 came meanwhile; bit 18 was on before, so it is of an earlier time.
    assert found.throttled == (
        "frequency capped",
        "soft temperature limit",
        "clock lowered by thermal-cpufreq-0 (step 2 of 6)",
    )
    assert found.throttled_earlier == ("throttled",)


def test_vcgencmd_is_asked_where_the_kernel_has_no_file(tmp_path: Path) -> None:
    tree = {name: text for name, text in boards.PI_4.items() if not name.endswith("get_throttled")}
    root = boards.build(tmp_path, tree)
    assert look(root, lambda: "throttled=0x50005").pi_flags == 0x50005
    assert look(root, lambda: "").pi_flags == 0
    assert look(root, lambda: "error=1 error_msg=x").pi_flags in (0, 1)
    (root / "proc/device-tree/model").write_text("NVIDIA Jetson Nano")
    assert look(root, lambda: pytest.fail("no Raspberry Pi")).pi_flags == 0


def test_a_board_that_tells_nothing_is_not_given_numbers(tmp_path: Path) -> None:
    found = between(look(tmp_path), look(tmp_path), tmp_path)
    assert (found.others, found.stolen, found.mhz, found.celsius) == (None, None, None, None)
    assert (found.governor, found.throttled, found.throttled_earlier, found.virtual) == ("", (), (), "")
    assert find_meter(0.0, tmp_path) is None
    assert gpu_bytes(4711, tmp_path) is None


def test_throttling_that_is_counted_shows_by_the_difference(tmp_path: Path) -> None:
    root = boards.build(tmp_path, boards.PC | boards.ORIN_NANO)
    before = look(root)
    assert between(before, look(root), root).throttled == ()
    boards.build(root, {"sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "2\n"})
    boards.build(root, {"sys/class/hwmon/hwmon2/oc1_event_cnt": "4\n"})
    assert between(before, look(root), root).throttled == (
        "processor throttled 2 times",
        "over-current protection oc1 1 times",
    )


def test_heat_is_the_processors_and_a_sensor_that_is_off_does_not_count(tmp_path: Path) -> None:
    moment = look(boards.build(tmp_path / "pc", boards.PC))
    assert (moment.celsius, moment.mhz) == (55.0, 3300.0)  # the disk's 99 degrees are not the processor's
    assert look(boards.build(tmp_path / "orin", boards.ORIN_NANO)).celsius == 48.968


def test_time_that_a_hypervisor_took(tmp_path: Path) -> None:
    before = Moment(0.0, busy_s=1.0, stolen_s=1.0, own_s=0.0)
    after = Moment(2.0, busy_s=3.5, stolen_s=2.0, own_s=2.0)
    found = between(before, after, tmp_path)
    assert (found.others, found.stolen) == (0.25, 0.5)


def used(meter: Meter | None, times: list[float]) -> float | None:
    assert meter is not None
    for now in times:
        meter.look(now)
    return meter.joules()


def test_jetsons_rail_of_the_whole_board(tmp_path: Path) -> None:
    meter = find_meter(0.0, boards.build(tmp_path, boards.ORIN_NANO))
    assert used(meter, [0.05, 0.5, 1.0, 2.0]) == pytest.approx(12.0)  # 5 V times 1.2 A for 2 s
    assert meter is not None
    assert meter.source == "the board's rail VDD_IN, idle power included"
    assert meter.seconds() == 2.0


def test_jetsons_of_older_releases_and_boards_without_a_rail_for_all(tmp_path: Path) -> None:
    meter = find_meter(0.0, boards.build(tmp_path / "nano", boards.NANO_OLD))
    assert used(meter, [1.0]) == pytest.approx(3.5)
    meter = find_meter(0.0, boards.build(tmp_path / "xavier", boards.XAVIER_WITHOUT_TOTAL))
    assert used(meter, [1.0]) == pytest.approx(3.5)
    assert meter is not None
    assert meter.source == "the sum of the rails GPU, CPU, SOC, idle power included"


def test_the_processors_counter_runs_over(tmp_path: Path) -> None:
    root = boards.build(tmp_path, boards.PC)
    meter = find_meter(0.0, root)
    boards.build(root, {"sys/class/powercap/intel-rapl:0/energy_uj": "671150\n"})
    assert used(meter, [1.0]) == pytest.approx(1.0)
    assert meter is not None
    assert "package-0 (RAPL)" in meter.source


def test_a_counter_that_this_account_may_not_read_is_no_meter(tmp_path: Path) -> None:
    root = boards.build(tmp_path, boards.PC)
    (root / "sys/class/powercap/intel-rapl:0/energy_uj").unlink()
    assert find_meter(0.0, root) is None


def test_power_is_integrated_over_what_was_read_and_a_gap_makes_it_unknown() -> None:
    readings = iter([1.0, 3.0, 3.0])
    meter = Meter("test", (), (Sensor("rail", lambda: next(readings, None)),), 0.0)
    assert used(meter, [1.0, 2.0]) == pytest.approx(2.0 + 3.0)
    assert used(meter, [3.0]) is None


def test_memory_for_the_gpu_is_that_of_the_process(tmp_path: Path) -> None:
    root = boards.build(tmp_path, boards.ORIN_NANO)
    assert gpu_bytes(4711, root) == (66820 + 1024) * 1024
    assert gpu_bytes(1234, root) == 11564 * 1024
    assert gpu_bytes(99, root) == 0


def test_the_peak_for_the_gpu_is_seen_while_it_lasts(tmp_path: Path) -> None:
    line = f"user  python3  {os.getpid()}  {{}}K\n"
    clients = "sys/kernel/debug/nvmap/iovmm/clients"
    root = boards.build(tmp_path, {clients: line.format(100)})
    with GpuPeak(root) as peak:
        boards.build(root, {clients: line.format(900)})
        deadline = time.monotonic() + 10
        while peak.bytes != 900 * 1024 and time.monotonic() < deadline:
            time.sleep(0.01)
        boards.build(root, {clients: line.format(300)})
    assert peak.bytes == 900 * 1024


CLOCKS = "sys/devices/system/clocksource/clocksource0/available_clocksource"


@pytest.mark.parametrize(
    ("files", "virtual", "kind"),
    [
        (boards.PI_4, "", "real"),
        (boards.ORIN_NANO, "", "real"),
        ({CLOCKS: "tsc kvm-clock acpi_pm\n"}, "kvm", "real"),
        ({"proc/device-tree/hypervisor/compatible": "linux,kvm\0"}, "kvm", "real"),
        ({"proc/cpuinfo": "model name\t: QEMU Virtual CPU version 2.5+\n"}, "qemu", "emulated"),
        ({"proc/cpuinfo": "model name\t: QEMU Virtual CPU version 2.5+\n", CLOCKS: "kvm-clock\n"}, "kvm", "real"),
        ({"proc/device-tree/compatible": "linux,dummy-virt\0"}, "qemu", "emulated"),
        (
            {
                "proc/device-tree/compatible": "linux,dummy-virt\0",
                "sys/class/ptp/ptp0/clock_name": "KVM virtual PTP\n",
            },
            "kvm",
            "real",
        ),
        ({"proc/cpuinfo": "model name\t: Intel(R) Xeon\nflags\t\t: fpu hypervisor\n"}, "unnamed", "real"),
    ],
)
def test_virtual_machines_are_named_and_emulated_ones_are_not_real(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], virtual: str, kind: str
) -> None:
    monkeypatch.delenv("KIRIDASHI_HARDWARE", raising=False)
    root = boards.build(tmp_path, files)
    assert virtual_machine(root) == virtual
    assert hardware_kind("aarch64", root) == kind


def test_the_description_tells_the_kind_of_machine_only(tmp_path: Path) -> None:
    tree = boards.PI_4 | {"proc/cpuinfo": "Serial\t\t: 10000000abcdef01\nModel\t\t: Raspberry Pi 4 Model B Rev 1.4\n"}
    found = description(boards.build(tmp_path, tree))
    assert found["board"] == "Raspberry Pi 4 Model B Rev 1.4"
    assert found["memory_mib"] == 3793
    texts = list(itertools.chain(map(str, found), map(str, found.values())))
    assert not any(secret in text for text in texts for secret in ("abcdef01", os.uname().nodename))
