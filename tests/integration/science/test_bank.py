"""The bank on a real database and file system: idempotent, forgetful when asked, honest about damage."""

import dataclasses
import multiprocessing
import sqlite3

import alembic.autogenerate
import alembic.migration
import numpy as np
import pytest
from kiridashi.errors import ExitCode
from kiridashi_server.bank.database import open_database
from kiridashi_server.bank.errors import BankDamagedError, UnknownRecordError
from kiridashi_server.bank.store import Bank
from kiridashi_server.bank.tables import metadata
from tiny_science import make_record


def _blobs(bank):
    return sorted(path.name for path in (bank.folder / "blobs").rglob("*") if path.is_file())


def test_a_record_comes_back_as_it_went_in_also_after_reopening(bank):
    record = make_record()
    assert bank.add(record)
    bank.close()
    with Bank.open(bank.folder, create=False) as reopened:
        found = reopened.get("hues")
    assert found.id == record.id
    plain = {
        field.name: getattr(record, field.name)
        for field in dataclasses.fields(record)
        if field.name not in ("scores", "taylor") and not isinstance(getattr(record, field.name), np.ndarray)
    }
    assert {name: getattr(found, name) for name in plain} == plain
    assert {name: values.tolist() for name, values in found.scores.items()} == {
        name: values.tolist() for name, values in record.scores.items()
    }


def test_adding_the_same_knowledge_twice_changes_nothing(bank):
    assert bank.add(make_record())
    files = _blobs(bank)
    assert not bank.add(make_record(created="2027-01-01T00:00:00+00:00", seconds=5.0))
    assert [record.created for record in bank.list()] == ["2026-01-01T00:00:00+00:00"]
    assert _blobs(bank) == files


def test_a_record_is_found_by_id_beginning_of_id_and_task(bank):
    record = make_record()
    bank.add(record)
    bank.add(make_record("other"))
    assert {bank.get(key).id for key in (record.id, record.id[:10], "hues")} == {record.id}


@pytest.mark.parametrize("key", ["", "nothing", "%", "_"])
def test_an_unknown_record_is_named_with_what_there_is(bank, key):
    bank.add(make_record())
    with pytest.raises(UnknownRecordError, match="it has hues") as caught:
        bank.get(key)
    assert caught.value.exit_code == ExitCode.INPUT


def test_a_task_learnt_twice_needs_an_id(bank):
    first, second = make_record(), make_record(head=np.ones((3, 4)))
    bank.add(first)
    bank.add(second)
    with pytest.raises(UnknownRecordError, match="'hues' means 2 records") as caught:
        bank.get("hues")
    assert first.id[:12] in caught.value.why
    assert bank.get(first.id[:12]).id == first.id


def test_list_is_ordered_and_by_backbone(bank):
    for task, fingerprint in (("b", "one"), ("a", "one"), ("c", "two")):
        bank.add(make_record(task, fingerprint=fingerprint))
    assert [record.task for record in bank.list()] == ["a", "b", "c"]
    assert [record.task for record in bank.list(backbone_fingerprint="one")] == ["a", "b"]


def test_forgetting_deletes_what_no_other_record_uses(bank):
    bank.add(make_record("first"))
    shared = set(_blobs(bank))
    bank.add(make_record("second", scores={"a": np.zeros(4, np.float32)}))
    own = set(_blobs(bank)) - shared
    assert len(own) == 1
    bank.remove("second")
    assert set(_blobs(bank)) == shared
    bank.remove("first")
    assert _blobs(bank) == []
    assert bank.list() == ()
    with pytest.raises(UnknownRecordError, match="no record at all"):
        bank.remove("first")


def test_a_changed_array_is_found_named_and_can_be_forgotten_and_learnt_again(bank):
    record = make_record()
    bank.add(record)
    bank.add(make_record("other", head=np.ones((3, 4)), scores={"a": np.zeros(2, np.float32)}))
    path = next(path for path in (bank.folder / "blobs").rglob("*") if path.is_file() and _is_of(bank, path, record))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BankDamagedError, match="'hues'") as caught:
        bank.get("hues")
    assert path.name in caught.value.why
    assert f"bank forget {record.id[:12]}" in caught.value.next_step
    assert bank.get("other").task == "other"
    inspection = bank.verify()
    assert [(fault.task, fault.record_id) for fault in inspection.faults] == [("hues", record.id)]
    bank.remove("hues")
    bank.add(record)
    assert bank.get("hues").id == record.id
    assert bank.verify().faults == ()


def _is_of(bank, path, record):
    with sqlite3.connect(bank.folder / "bank.db") as connection:
        query = "SELECT COUNT(*) FROM record_blobs WHERE sha256 = ? AND record_id = ? AND kind = 'scores'"
        return connection.execute(query, (path.name, record.id)).fetchone()[0] == 1


def test_a_missing_array_is_a_fault_too(bank):
    bank.add(make_record())
    for path in (bank.folder / "blobs").rglob("*"):
        if path.is_file():
            path.unlink()
    assert len(bank.verify().faults) == 3
    with pytest.raises(BankDamagedError, match="damaged"):
        bank.list()


def test_leftovers_of_interrupted_writes_are_cleared(bank):
    bank.add(make_record())
    kept = _blobs(bank)
    leftover = bank.folder / "blobs" / "ab" / ("ab" * 32)
    leftover.parent.mkdir(exist_ok=True)
    leftover.write_bytes(b"of a record that was never written")
    assert bank.verify().leftovers_removed == 1
    assert _blobs(bank) == kept


def test_a_folder_without_a_bank_is_said_so(tmp_path):
    with pytest.raises(UnknownRecordError, match="no bank"):
        Bank.open(tmp_path / "nowhere", create=False)
    assert not (tmp_path / "nowhere").exists()


def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path):
    path = tmp_path / "bank.db"
    path.write_bytes(b"something else entirely, and long enough to have a header of its own" * 20)
    before = path.read_bytes()
    with pytest.raises(BankDamagedError, match="cannot be opened as a bank") as caught:
        Bank.open(tmp_path)
    assert caught.value.exit_code == ExitCode.STATE
    assert path.read_bytes() == before


def test_a_bank_of_a_newer_version_is_refused(bank):
    bank.close()
    with sqlite3.connect(bank.folder / "bank.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(BankDamagedError, match="not known here"):
        Bank.open(bank.folder)


def test_migrations_lead_to_the_tables_the_code_uses(tmp_path):
    engine = open_database(tmp_path / "bank.db")
    with engine.begin() as connection:
        context = alembic.migration.MigrationContext.configure(connection)
        assert alembic.autogenerate.compare_metadata(context, metadata) == []
    engine.dispose()


def _add_and_forget(folder, number, barrier):
    barrier.wait(60)
    with Bank.open(folder) as bank:
        for turn in range(6):
            bank.add(make_record(f"task {number}-{turn}"))  # all share the same arrays
            bank.add(make_record("common"))
            if turn % 2:
                bank.remove(f"task {number}-{turn}")


def test_processes_that_write_at_the_same_time_from_the_first_opening_lose_nothing(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(3)
    workers = [spawn.Process(target=_add_and_forget, args=(tmp_path, number, barrier)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(100)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    with Bank.open(tmp_path) as bank:
        expected = {"common"} | {f"task {number}-{turn}" for number in range(3) for turn in (0, 2, 4)}
        assert {record.task for record in bank.list()} == expected
        assert bank.verify().faults == ()
