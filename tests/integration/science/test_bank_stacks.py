"""A bank with enough records for a stack: found again, never stale, forgotten with its records."""

import sqlite3

import numpy as np
import pytest
from kiridashi.errors import InputError
from kiridashi_server.bank.database import open_database
from kiridashi_server.bank.errors import BankDamagedError, UnknownRecordError
from kiridashi_server.bank.stacks import STACK_FROM
from kiridashi_server.bank.store import Bank
from kiridashi_server.compose.composition import robust_mean
from tiny_science import make_record

SECRET = 123.456


@pytest.fixture
def large(bank):
    generator = np.random.default_rng(0)
    for number in range(STACK_FROM):
        scores = {"a": generator.random(4).astype(np.float32), "b": generator.random(6).astype(np.float32)}
        bank.add(make_record(f"task {number:03d}", scores=scores))
    return bank


def _files(bank):
    return sorted((bank.folder / "stacks").glob("*"))


def _means(stack):
    return stack.mean(dict.fromkeys(stack.ids, 1 / len(stack.ids)))


def test_a_stack_is_made_once_and_gives_the_mean_of_all(large):
    assert large.stack("other", "layout") is None
    stack = large.stack("backbone", "layout")
    (path,) = _files(large)
    written = path.stat().st_mtime_ns
    expected = robust_mean([record.scores for record in large.list()], np.full(STACK_FROM, 1 / STACK_FROM))
    for name, values in _means(large.stack("backbone", "layout")).items():
        assert values == pytest.approx(expected[name], rel=1e-5)
    assert _files(large)[0].stat().st_mtime_ns == written
    assert set(stack.ids) == {record.id for record in large.summaries()}


def test_a_new_record_means_a_new_stack(large):
    before = _means(large.stack("backbone", "layout"))
    scores = {"a": np.array([9, 0, 0, 0], np.float32), "b": np.zeros(6, np.float32)}
    large.add(make_record("another", scores=scores))
    after = large.stack("backbone", "layout")
    assert len(after.ids) == STACK_FROM + 1
    assert _means(after)["a"].tolist() != before["a"].tolist()
    assert len(_files(large)) == 1  # the earlier set's is gone
    assert large.verify().stacks_removed == 0


def test_checkpoints_are_on_the_scale_of_the_learnt_ones(large):
    scores = {"a": np.array([1, 2, 3, 4], np.float32) * 1e6, "b": np.ones(6, np.float32) * 1e6}
    record = make_record("old model", scores=scores, headless=True, kind="tuned")
    large.add(record)
    stack = large.stack("backbone", "layout")
    row = stack.matrix[stack.ids.index(record.id)]
    assert row.max() < 1
    assert (np.diff(row[:4]) > 0).all()


def test_forgetting_removes_the_scores_from_the_stack_too(large):
    scores = {"a": np.full(4, SECRET, np.float32), "b": np.ones(6, np.float32)}
    large.add(make_record("secret", scores=scores))
    large.stack("backbone", "layout")
    needle = np.float32(SECRET).tobytes()
    holding = [path for path in large.folder.rglob("*") if path.is_file() and needle in path.read_bytes()]
    assert any(path.parent.name == "stacks" for path in holding)
    large.remove("secret")
    assert [path for path in large.folder.rglob("*") if path.is_file() and needle in path.read_bytes()] == []
    assert len(large.stack("backbone", "layout").ids) == STACK_FROM


def test_a_damaged_stack_is_found_by_verify_and_made_again(large):
    expected = _means(large.stack("backbone", "layout"))
    (path,) = _files(large)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert large.verify().stacks_removed == 1
    assert _files(large) == []
    assert _means(large.stack("backbone", "layout"))["b"].tolist() == expected["b"].tolist()
    path.write_bytes(b"\x93NUMPY torn")
    assert _means(large.stack("backbone", "layout"))["b"].tolist() == expected["b"].tolist()


def test_what_an_interrupted_write_left_is_cleared(large):
    large.stack("backbone", "layout")
    (large.folder / "stacks" / ".stack.abc.npy").write_bytes(b"half")
    assert large.verify().stacks_removed == 1
    assert len(_files(large)) == 1


def test_records_of_other_groups_are_named(large):
    large.add(make_record("odd", scores={"a": np.ones(4, np.float32)}))
    with pytest.raises(InputError, match="cannot be combined"):
        large.stack("backbone", "layout")
    assert _files(large) == []


def test_scores_are_read_when_they_are_looked_at_and_damage_is_named_then(large):
    record = make_record("hues", scores={"a": np.full(4, 5, np.float32), "b": np.ones(6, np.float32)})
    large.add(record)
    large.folder.joinpath("blobs", *_path_of(large, record)).unlink()
    listed = next(one for one in large.list() if one.task == "hues")
    assert listed.id == record.id
    with pytest.raises(BankDamagedError, match="'hues'"):
        _ = listed.scores["a"]
    with pytest.raises(BankDamagedError, match="'hues'"):
        large.get("hues")
    assert large.summary("hues").task == "hues"


def _path_of(bank, record):
    sha256 = bank.digests_of(record.id)["scores"]
    return sha256[:2], sha256


def test_summaries_need_no_arrays(large):
    for path in (large.folder / "blobs").rglob("*"):
        if path.is_file():
            path.unlink()
    assert len(large.summaries()) == STACK_FROM
    assert [one.task for one in large.summaries(task="task 003")] == ["task 003"]
    assert large.summaries(backbone_fingerprint="other") == ()


def test_a_bank_of_the_first_version_is_brought_up_to_date(tmp_path):
    with Bank.open(tmp_path) as bank:
        bank.add(make_record())
        identity = bank.summary("hues").id
    with sqlite3.connect(tmp_path / "bank.db") as connection:
        connection.execute("ALTER TABLE records DROP COLUMN kind")
        connection.execute("UPDATE records SET provenance = json_remove(provenance, '$.origin')")
        connection.execute("UPDATE alembic_version SET version_num = '0001'")
    open_database(tmp_path / "bank.db").dispose()
    with Bank.open(tmp_path) as bank:
        record = bank.get("hues")
    assert (record.id, record.kind, record.provenance.origin) == (identity, "learnt", "")


def test_an_unknown_record_of_a_large_bank_is_answered_shortly(large):
    with pytest.raises(UnknownRecordError, match="task 009 and 54 more"):
        large.get("nothing")
    with pytest.raises(UnknownRecordError, match="means"):
        large.get(next(one.id[0] for one in large.summaries() if _shared(large, one.id[0])))


def _shared(bank, beginning):
    return sum(one.id.startswith(beginning) for one in bank.summaries()) > 1
