"""The bounds hold, the martingale is one, the thinning is right, and the watch finds changes and nothing else."""

from __future__ import annotations

from itertools import product

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kiridashi.drift.events import MAX_CLASSES, OTHER, make_events, occurrences, share_limit
from kiridashi.drift.evidence import no_evidence, taken
from kiridashi.drift.rows import Row
from kiridashi.drift.statistics import NAMES
from kiridashi.drift.thinning import stride
from kiridashi.drift.watch import WatchState, advanced, new_watch, shows, summary

LABELS = ("dent", "ok", "scratch")
MIX = (0.1, 0.7, 0.2)
WANTED = 100


def rows(count: int, rng: np.random.Generator, shift: dict[str, float] | None = None, mix=MIX) -> list[Row]:
    """Independent frames; ``shift`` moves a statistic by so many standard deviations."""
    values = rng.normal(size=(count, len(NAMES)))
    for name, amount in (shift or {}).items():
        values[:, NAMES.index(name)] += amount
    best = rng.choice(len(mix), count, p=mix)
    return [Row(float(n), int(b), tuple(v)) for n, (b, v) in enumerate(zip(best, values.tolist(), strict=True))]


def watching(rng: np.random.Generator, server: int = 0, wanted: int = WANTED) -> WatchState:
    state = new_watch("sha256:m", LABELS, rows(server, rng), wanted)
    return advanced(state, rows(2 * wanted, rng))


class TestLimits:
    @given(st.integers(1, 60), st.integers(1, 60), st.floats(1e-6, 0.3))
    def test_the_limit_leaves_delta_below(self, k: int, n: int, delta: float) -> None:
        if k > n:
            assert share_limit(k, n, delta) == 1.0
            return
        x = share_limit(k, n, delta)
        binomial = [1.0]
        for _ in range(n):
            binomial = [(1 - x) * a + x * b for a, b in zip([*binomial, 0.0], [0.0, *binomial], strict=True)]
        assert sum(binomial[:k]) == pytest.approx(delta, rel=1e-6)

    def test_closed_forms(self) -> None:
        assert share_limit(1, 10, 0.05) == pytest.approx(1 - 0.05**0.1)
        assert share_limit(10, 10, 0.05) == pytest.approx(0.95**0.1)

    def test_true_shares_are_inside_all_limits_as_often_as_promised(self) -> None:
        rng, broken = np.random.default_rng(0), 0
        for _ in range(60):
            reference = np.exp(rng.normal(size=(80, len(NAMES))))  # skewed: the bounds know no distribution
            best = rng.choice(3, 80, p=MIX)
            events = make_events(reference, best, LABELS, delta=0.2)
            fresh = np.exp(rng.normal(size=(4000, len(NAMES))))
            seen = occurrences(events, fresh, rng.choice(3, 4000, p=MIX)).mean(axis=0)
            slack = 3 * np.sqrt(seen * (1 - seen) / 4000)
            broken += bool((seen - slack > [event.limit for event in events.events]).any())
        assert broken <= 20  # at most 12 of 60 are to be expected

    def test_the_last_of_many_classes_are_pooled(self) -> None:
        rng = np.random.default_rng(1)
        labels = tuple(f"c{n}" for n in range(50))
        best = rng.integers(0, 40, 300)
        events = make_events(rng.normal(size=(300, len(NAMES))), best, labels, delta=0.01)
        assert len(events.named) == MAX_CLASSES
        pooled = next(
            event
            for event in events.events
            if (event.best, event.change) == (OTHER, "more often") and event.column is None
        )
        strange = MAX_CLASSES + 1
        shown = occurrences(
            msgspec.structs.replace(events, events=(pooled,)),
            np.zeros((2, len(NAMES))),
            np.array([strange, events.named[0]]),
        )
        assert shown[:, 0].tolist() == [True, False]


class TestEvidence:
    def test_its_mean_is_exactly_one_at_the_limit_and_below_one_under_it(self) -> None:
        limits = np.array([0.3])
        for share, means in ((0.3, 1.0), (0.2, None)):
            total = 0.0
            for sequence in product((True, False), repeat=9):
                hits = sum(sequence)
                found = taken(no_evidence(1), np.array(sequence)[:, None], limits)
                total += share**hits * (1 - share) ** (9 - hits) * final(found)
            assert total == pytest.approx(1.0) if means else total < 0.99

    def test_villes_bound(self) -> None:
        rng = np.random.default_rng(2)
        streams = rng.random((3000, 400)) < 0.25
        highest = np.array(taken(no_evidence(400), streams, np.full(400, 0.25)).highest)
        assert (highest >= np.log(10)).mean() <= 0.1 + 3 * np.sqrt(0.09 / 400)
        assert (highest >= np.log(2)).mean() > 0.02  # it is not merely idle

    def test_old_calm_does_not_weigh_against_a_new_change(self) -> None:
        rng = np.random.default_rng(3)
        limits, soon = np.array([0.1]), {}
        for calm in (10, 100_000):
            stream = np.concatenate([rng.random(calm) < 0.05, rng.random(200) < 0.9])
            evidence = taken(no_evidence(1), stream[:calm, None], limits)
            for n in range(calm, len(stream)):
                evidence = taken(evidence, stream[n : n + 1, None], limits)
                if evidence.highest[0] > np.log(1e5):
                    soon[calm] = n + 1 - calm
                    break
            assert abs(evidence.starts[0] - calm) <= 3
        assert soon[100_000] <= soon[10] + 15

    @given(st.lists(st.booleans(), max_size=30), st.integers(0, 30))
    @settings(max_examples=30)
    def test_pieces_do_not_matter(self, stream: list[bool], cut: int) -> None:
        seen, limits = np.array(stream, bool).reshape(-1, 1), np.array([0.4])
        whole = taken(no_evidence(1), seen, limits)
        parts = taken(taken(no_evidence(1), seen[:cut], limits), seen[cut:], limits)
        assert np.allclose(whole.products, parts.products)
        assert (whole.frames, whole.starts) == (parts.frames, parts.starts)
        assert whole.highest == pytest.approx(parts.highest)


def final(evidence) -> float:
    """The evidence now, and not its highest value."""
    left = 1 / np.log2(evidence.frames + 2)
    return float(np.exp(np.array(evidence.products)).sum() + left)


class TestStride:
    def values(self, count: int, keep: float, rng: np.random.Generator) -> np.ndarray:
        noise, x = rng.normal(size=count), np.zeros(count)
        for n in range(1, count):
            x[n] = keep * x[n - 1] + np.sqrt(1 - keep**2) * noise[n]
        return x

    def test_independent_frames_are_all_used(self) -> None:
        rng = np.random.default_rng(4)
        assert stride(rng.normal(size=(2000, 20)), rng.integers(0, 3, 2000)) == 1

    def test_one_slow_statistic_decides(self) -> None:
        rng = np.random.default_rng(5)
        table = rng.normal(size=(20_000, 4))
        table[:, 2] = np.exp(self.values(20_000, 0.9, rng))
        assert 17 <= stride(table, np.zeros(20_000, np.int64)) <= 30  # 0.9^22 = 0.1

    def test_held_frames_and_held_classes(self) -> None:
        rng = np.random.default_rng(6)
        held = np.repeat(rng.normal(size=(300, 3)), 10, axis=0)
        assert 9 <= stride(held, np.zeros(3000, np.int64)) <= 12
        classes = np.repeat(rng.integers(0, 3, 300), 10)
        assert 9 <= stride(rng.normal(size=(3000, 3)), classes) <= 12

    def test_what_never_changes_does_not_count_and_a_trend_has_no_stride(self) -> None:
        rng = np.random.default_rng(7)
        table = np.hstack([np.full((500, 1), 3.0), rng.normal(size=(500, 1))])
        assert stride(table, np.zeros(500, np.int64)) == 1
        assert stride(np.zeros((500, 2)), np.zeros(500, np.int64)) == 1
        assert stride(np.arange(500.0)[:, None], np.zeros(500, np.int64)) > 100


class TestWatch:
    def test_a_line_that_does_not_change_is_left_alone(self) -> None:
        rng = np.random.default_rng(8)
        alarmed = 0
        for _ in range(40):
            state = advanced(watching(rng, server=60), rows(1500, rng))
            assert state.stride >= 1
            alarmed += bool(state.findings)
        assert alarmed <= 2  # 0.4 are to be expected at most

    @pytest.mark.parametrize(
        ("shift", "mix", "signal"),
        [
            ({"brightness": -2.0}, MIX, "image"),
            ({"sharpness": 1.5}, MIX, "image"),
            ({"confidence": -1.5}, MIX, "outputs"),
            ({}, (0.7, 0.1, 0.2), "classes"),
        ],
    )
    def test_a_change_is_found_named_and_dated(self, shift, mix, signal) -> None:
        rng = np.random.default_rng(9)
        state = advanced(watching(rng), rows(300, rng))
        assert state.findings == ()
        changed = [Row(300 + row.at_s, row.best, row.values) for row in rows(400, rng, shift, mix)]
        for n in range(0, 400, 10):
            state = advanced(state, changed[n : n + 10])
            if state.findings:
                break
        (finding,) = state.findings
        assert (finding.reference, finding.signal) == ("line", signal)
        assert finding.statistic in (*shift, *(LABELS if signal == "classes" else ()))
        assert finding.p_value <= 0.0025
        assert finding.share > finding.limit
        assert 280 <= finding.since_s <= finding.at_s
        assert np.sign(finding.now - finding.before) == (
            1 if "higher" in finding.change or "more" in finding.change else -1
        )
        assert finding.statistic in finding.text
        typical = max(changed, key=lambda row: abs(row.values[0]))
        assert any(shows(state, finding, row) for row in changed[:50]), typical

    def test_every_signal_is_reported_once(self) -> None:
        rng = np.random.default_rng(10)
        state = advanced(watching(rng, server=60), rows(600, rng, {"brightness": 3.0, "texture": 3.0, "entropy": 3.0}))
        found = [(finding.reference, finding.signal) for finding in state.findings]
        assert len(found) == len(set(found))
        assert {("line", "image"), ("line", "outputs"), ("server", "image"), ("server", "outputs")} <= set(found)

    def test_a_line_unlike_the_servers_samples_is_said_when_learning_ends(self) -> None:
        rng = np.random.default_rng(11)
        start = new_watch("sha256:m", LABELS, rows(80, rng), WANTED)
        state = advanced(start, rows(2 * WANTED, rng, {"colour": 2.5}))
        assert [(f.reference, f.statistic) for f in state.findings] == [("server", "colour")]
        tuned = new_watch("sha256:m", LABELS, rows(80, rng), WANTED, tuned=True)
        assert advanced(tuned, rows(300, rng, {"confidence": 3.0})).findings == ()

    def test_repeated_frames_are_thinned_and_raise_no_alarm(self) -> None:
        rng = np.random.default_rng(12)
        video = [row for row in rows(1200, rng) for _ in range(8)]
        state = advanced(new_watch("sha256:m", LABELS, (), WANTED), video)
        assert 7 <= state.stride <= 10
        assert state.held["line"].evidence.frames > 300
        assert state.findings == ()

    def test_learning_is_bounded_however_slow_the_line(self) -> None:
        rng = np.random.default_rng(13)
        slow = np.cumsum(rng.normal(size=(20_000, 1)), axis=0)
        stream = [Row(0.0, 0, tuple(slow[n].tolist() * len(NAMES))) for n in range(len(slow))]
        state = advanced(new_watch("sha256:m", LABELS, (), WANTED), stream)
        assert len(state.learning) <= 5 * WANTED + 64
        told = summary(state)
        assert told.phase == "watching" or told.learnt < WANTED

    def test_pieces_do_not_matter_once_it_watches(self) -> None:
        rng = np.random.default_rng(14)
        state, stream = watching(rng), rows(90, rng)
        state = msgspec.structs.replace(state, stride=3)
        whole = advanced(state, stream)
        parts = state
        for n in range(0, 90, 7):
            parts = advanced(parts, stream[n : n + 7])
        assert (whole.sampled, whole.recent, whole.findings) == (parts.sampled, parts.recent, parts.findings)
        assert np.allclose(whole.held["line"].evidence.products, parts.held["line"].evidence.products)

    def test_the_state_survives_json(self) -> None:
        rng = np.random.default_rng(15)
        for state in (watching(rng, server=40), advanced(new_watch("sha256:m", LABELS, rows(30, rng)), rows(70, rng))):
            again = msgspec.json.decode(msgspec.json.encode(state), type=WatchState)
            assert again == state
            more = rows(200, rng)
            assert summary(advanced(again, more)) == summary(advanced(state, more))
