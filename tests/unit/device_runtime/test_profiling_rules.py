"""Profiling, its pure parts: turns and quiet times, sharing out memory and time, which record may be continued."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
from kiridashi.errors import StateError
from kiridashi.messages import check_name
from kiridashi_agent.interleave import quiet_times, take_turns
from kiridashi_agent.jobs import TURN, InterleaveRequest
from kiridashi_agent.machine import available_bytes, device_class
from kiridashi_agent.profile_record import (
    SITTINGS,
    Alone,
    Key,
    Record,
    Sitting,
    next_sitting,
    open_record,
    save_record,
    to_report,
)

MIB = 1 << 20
KEY = Key(probes="0" * 64, device_class="board-4c-4gib", runtime="onnxruntime 1.30.0", threads=1, hardware="real")
SIZES = {"dense": 10 * MIB, "a": 4 * MIB, "b": 3 * MIB, "c": 2 * MIB, "d": MIB}
NAMES = tuple(SIZES)
EMPTY = 50 * MIB
START_S = 2.0


def alone(p50_ms: float = 2.0, memory_bytes: int = 0, load_ms: float = 0.0) -> Alone:
    return Alone(p50_ms=p50_ms, p95_ms=3.0, memory_bytes=memory_bytes, load_ms=load_ms, start_s=START_S / 2)


def measured_alone(**p50_ms: float) -> Record:
    """Every graph needs its file's size over an empty process of 50 MiB."""
    return Record(KEY, alone={n: alone(p50_ms.get(n, 2.0), EMPTY + size) for n, size in SIZES.items()})


def sat(record: Record, quiet_ms: dict[str, float]) -> Record:
    return msgspec.structs.replace(record, sittings=(*record.sittings, Sitting(quiet_ms, runs=60)))


def run_down(record: Record, memory_bytes: float, seconds: float) -> list[tuple[str, ...]]:
    """All sittings until there are no more to take."""
    taken = []
    while not to_report(record, NAMES).complete:
        plan = next_sitting(record, SIZES, memory_bytes, seconds)
        assert plan is not None
        taken.append(plan.graphs)
        record = sat(record, dict.fromkeys(plan.graphs, 1.0))
    return taken


def test_each_round_has_all_once_in_its_own_order_and_the_same_seed_the_same_orders() -> None:
    def orders(seed: int) -> list[tuple[int, ...]]:
        seen: list[int] = []
        turns = [lambda n=n: float(seen.append(n) or n) for n in range(6)]
        times = take_turns(turns, InterleaveRequest("", (), max_rounds=5, seed=seed), 1.0, clock=lambda: 0.0)
        assert times.tolist() == [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]] * 5
        return [tuple(seen[start : start + 6]) for start in range(0, 30, 6)]

    rounds = orders(3)
    assert all(sorted(order) == list(range(6)) for order in rounds)
    assert len(set(rounds)) > 1
    assert orders(3) == rounds != orders(4)


def test_when_the_time_is_up_a_round_begun_does_not_count_but_two_are_made() -> None:
    ticks = itertools.count()
    turns = [lambda: 1.0] * 4
    request = InterleaveRequest("", (), max_rounds=100)
    assert take_turns(turns, request, 14.5, clock=lambda: float(next(ticks))).shape == (3, 4)
    assert take_turns(turns, request, 0.0, clock=lambda: float(next(ticks))).shape == (2, 4)
    assert take_turns(turns, msgspec.structs.replace(request, max_rounds=7), math.inf).shape == (7, 4)


def test_quiet_time_is_the_mean_of_the_quickest_quarter() -> None:
    times = np.column_stack([np.arange(8.0, 0.0, -1.0), np.full(8, 2.0)])
    assert quiet_times(times).tolist() == [1.5, 2.0]
    assert quiet_times(times[:2]).tolist() == [7.0, 2.0]


def test_disturbed_rounds_do_not_move_the_quiet_time() -> None:
    rng = np.random.default_rng(0)
    times = np.array([3.0, 1.0]) * rng.gamma(1e4, 1e-4, (60, 2))
    disturbed = times.copy()
    disturbed[rng.random((60, 2)) < 0.5] *= 3
    assert quiet_times(disturbed) == pytest.approx(quiet_times(times), rel=0.01)


def test_with_room_for_all_every_sitting_has_all() -> None:
    assert run_down(measured_alone(), math.inf, 600.0) == [NAMES] * SITTINGS
    assert run_down(measured_alone(), EMPTY + sum(SIZES.values()), 600.0) == [NAMES] * SITTINGS


def test_batches_fit_the_memory_and_the_dense_model_is_in_each() -> None:
    limit = EMPTY + 15 * MIB
    batches = run_down(measured_alone(), limit, 600.0)
    assert batches == [("dense", "a"), ("dense", "b", "c"), ("dense", "d")] * SITTINGS
    assert all(EMPTY + sum(SIZES[name] for name in batch) <= limit for batch in batches)


def test_less_memory_than_one_pair_needs_still_gives_pairs_and_the_limit_decides() -> None:
    assert run_down(measured_alone(), MIB, 600.0) == [("dense", name) for name in "abcd"] * SITTINGS


def test_a_short_time_gives_smaller_batches_and_then_none() -> None:
    slow = measured_alone(**dict.fromkeys(NAMES, 100.0))
    one = 11 * TURN * 0.1
    assert next_sitting(slow, SIZES, math.inf, START_S + 5.1 * one).graphs == NAMES
    assert next_sitting(slow, SIZES, math.inf, START_S + 3.1 * one).graphs == NAMES[:3]
    assert next_sitting(slow, SIZES, math.inf, START_S + 2.1 * one).graphs == NAMES[:2]
    assert next_sitting(slow, SIZES, math.inf, START_S + 1.9 * one) is None


def test_time_is_shared_out_by_what_the_graphs_cost() -> None:
    record = measured_alone(a=6.0)
    first = next_sitting(record, SIZES, math.inf, 101.0)
    assert first.seconds == pytest.approx(101.0 / 2 - START_S)
    pair = next_sitting(record, SIZES, EMPTY + 14 * MIB, 101.0)
    assert pair.graphs == ("dense", "a")
    assert pair.seconds == pytest.approx(101.0 * 6 / 24 - START_S)


def test_a_set_of_the_dense_model_alone() -> None:
    sizes = {"dense": MIB}
    record = Record(KEY, alone={"dense": alone(memory_bytes=EMPTY)})
    for _ in range(SITTINGS):
        plan = next_sitting(record, sizes, math.inf, 60.0)
        assert plan.graphs == ("dense",)
        record = sat(record, {"dense": 1.0})
    assert to_report(record, ("dense",)).complete


def test_the_quieter_sitting_counts_and_both_are_told() -> None:
    record = sat(sat(measured_alone(), {"dense": 5.0, "a": 2.2}), {"dense": 4.0, "a": 2.0})
    report = to_report(record, ("dense", "a", "b"))
    assert not report.complete
    dense, a = report.timings
    assert (a.name, a.quiet_ms, a.halves_ms, a.anchor_ms, a.runs) == ("a", 2.0, (2.2, 2.0), 4.0, 120)
    assert (dense.quiet_ms, dense.halves_ms) == (4.0, (5.0, 4.0))
    assert (a.p50_ms, a.p95_ms, a.memory_bytes) == (2.0, 3.0, EMPTY + 4 * MIB)


def test_a_tail_that_is_not_the_models_is_noted() -> None:
    restless = {"dense": alone(p50_ms=0.9), "a": alone(p50_ms=2.0)}
    report = to_report(Record(KEY, alone=restless, notes=("hot 84 C",)), ("dense", "a"))
    assert report.notes == ("hot 84 C", "other work disturbed 1 of 2 graphs alone: p95 over 3 medians")


def test_a_record_is_continued_only_by_its_own_kind_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "record"
    kept = sat(measured_alone(), {"dense": 5.0})
    save_record(path, kept)
    assert open_record(path, KEY) == kept
    for n, (field, value, words) in enumerate(
        [
            ("probes", "1" * 64, "another probe set"),
            ("device_class", "board-2c-4gib", "another device class (board-4c-4gib)"),
            ("runtime", "onnxruntime 1.31.0", "another runtime (onnxruntime 1.30.0)"),
            ("threads", 2, "another threads (1)"),
        ],
        start=1,
    ):
        fresh = open_record(path, msgspec.structs.replace(KEY, **{field: value}))
        assert fresh.alone == {}
        assert words in fresh.notes[0]
        aside = tmp_path / f"record.{n}"
        assert aside.name in fresh.notes[0]
        assert not path.exists()
        assert open_record(aside, KEY) == kept
        save_record(path, kept)


def test_a_damaged_record_is_set_aside_and_a_folder_in_its_place_refused(tmp_path: Path) -> None:
    path = tmp_path / "record"
    path.write_bytes(b'{"key": 3')
    assert "it cannot be read" in open_record(path, KEY).notes[0]
    assert (tmp_path / "record.1").read_bytes() == b'{"key": 3'
    path.mkdir()
    with pytest.raises(StateError, match="cannot be read"):
        open_record(path, KEY)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("board", "model", "memory_kib", "cores", "name"),
    [
        ("Raspberry Pi 4 Model B Rev 1.4\0", "", 3884340, 4, "raspberry-pi-4-model-b-4c-4gib"),
        ("Raspberry Pi 4 Model B Rev 1.5\0", "", 3884344, 4, "raspberry-pi-4-model-b-4c-4gib"),
        ("Raspberry Pi Zero 2 W Rev 1.0\0", "", 426160, 4, "raspberry-pi-zero-2-w-4c-512mib"),
        ("NVIDIA Jetson Orin Nano Developer Kit\0", "", 7802680, 6, "nvidia-jetson-orin-nano-developer-kit-6c-8gib"),
        ("", "Intel(R) Core(TM) i5-8250U CPU @ 1.60GHz", 16302000, 8, "intel-core-i5-8250u-8c-16gib"),
        ("", "AMD EPYC", 24684000, 2, "amd-epyc-2c-24gib"),
        ("", "", 1000000, 1, "aarch64-1c-1gib"),
        ("A board with a name that is longer than any topic may be " * 2, "", 1000000, 1, None),
        ("\N{GREEK SMALL LETTER PI}", "", 1000000, 1, "unknown-1c-1gib"),
    ],
)
def test_device_class(tmp_path: Path, board: str, model: str, memory_kib: int, cores: int, name: str | None) -> None:
    if board:
        write(tmp_path / "proc/device-tree/model", board)
    write(tmp_path / "proc/cpuinfo", f"processor\t: 0\nmodel name\t: {model}\n" if model else "processor\t: 0\n")
    write(tmp_path / "proc/meminfo", f"MemTotal:  {memory_kib} kB\nMemAvailable:   1024 kB\n")
    seen = device_class(tmp_path, "aarch64", cores)
    assert check_name(seen, "device class") == seen
    assert seen == name if name else seen.endswith("-1c-1gib")
    assert available_bytes(tmp_path) == MIB
