"""The benchmark of settings: bad records are bad in the way they say, and wrong settings are wrong in one place."""

from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
from kiridashi_server.recover.iterations import RecoverSettings
from tiny_science import make_record, tiny_net
from torch import fx

from benchmarks.settings_lines import wrong
from benchmarks.settings_poison import MISSING, POISONS, poisoned


@pytest.fixture
def records():
    generator = np.random.default_rng(0)
    return [make_record(f"task {n}", scores={"a": generator.random(9).astype(np.float32)}) for n in range(11)]


@pytest.mark.parametrize("kind", POISONS)
def test_a_fifth_of_the_records_is_bad_and_always_the_same(records, kind):
    found = poisoned(records, kind, seed=1)
    bad = [n for n, (own, record) in enumerate(zip(found, records, strict=True)) if own is not record]
    assert len(bad) == 3
    left = poisoned(records, MISSING, seed=1)
    assert left == [record for n, record in enumerate(records) if n not in bad]
    assert bad != [
        n for n, (own, record) in enumerate(zip(poisoned(records, kind, 2), records, strict=True)) if own is not record
    ]
    for n in bad:
        own, was = found[n].scores["a"], records[n].scores["a"]
        assert (found[n].task, own.dtype) == (records[n].task, np.float32)
        assert not np.array_equal(own, was)
        assert found[n].id != records[n].id
        if kind == "inverted":
            assert np.array_equal(np.argsort(own), np.argsort(was)[::-1])
        elif kind == "random":
            assert np.array_equal(np.sort(own), np.sort(was))
        elif kind == "huge":
            assert np.sort(own) == pytest.approx(1e4 * np.sort(was))
        else:
            assert any(np.array_equal(own, record.scores["a"]) for record in records)


def test_each_wrong_setting_differs_in_one_place():
    chain = SimpleNamespace(backbone=SimpleNamespace(program=fx.symbolic_trace(tiny_net())))
    for right in (RecoverSettings(), RecoverSettings(iterations=0), RecoverSettings(way=1.0)):
        found = wrong(right, chain)
        for name, settings in found.items():
            changed = {key for key, value in asdict(settings).items() if value != asdict(right)[key]}
            assert len(changed) == 1, name
        assert ("iterations_20" in found) == (right.iterations == 0)
        assert ("way_x2" in found) == (right.iterations > 0 and right.way < 1)
    assert {"iterations_x2", "iterations_x0.5", "rate_x2", "ridge_x0.5"} <= wrong(RecoverSettings(), chain).keys()
    assert wrong(RecoverSettings(), chain)["rate_x2"].learning_rate == pytest.approx(1e-3)
