"""Trust: every attack is refused by name, and what was believed before stays."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from fake_fleet import DirectTransport, FakeFleet
from kiridashi.errors import BundleError, NetworkError, StateError, TrustError
from kiridashi_agent import metadata as module
from kiridashi_agent.metadata import TrustStore
from kiridashi_agent.transport import NotFoundError
from kiridashi_agent.trust_child import SealOrder, carry_out, run_in_child
from tiny_bundle import make_bundle

TARGET = "lines/press-3/1.json"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    return folder, make_bundle(folder)


@pytest.fixture
def fleet(bundle) -> FakeFleet:
    fleet = FakeFleet()
    fleet.publish(*bundle)
    return fleet


@pytest.fixture
def store(fleet, tmp_path) -> TrustStore:
    return TrustStore(tmp_path / "metadata", fleet.root, carry_out)


def fetch(store: TrustStore, fleet: FakeFleet, target: str = TARGET):
    return store.fetch_manifest(DirectTransport(fleet), "press-3", target)


def test_a_signed_manifest_is_taken_and_the_second_time_too(store, fleet, bundle) -> None:
    assert fetch(store, fleet) == bundle[1]
    fleet.commit()
    assert fetch(store, fleet) == bundle[1]


def test_a_rollback_of_the_metadata_is_refused(store, fleet) -> None:
    old = fleet.metadata["timestamp.json"]
    fleet.commit()
    fetch(store, fleet)
    fleet.metadata["timestamp.json"] = old
    with pytest.raises(TrustError, match="older metadata"):
        fetch(store, fleet)


def test_an_expired_timestamp_is_refused(store, fleet) -> None:
    fleet.commit(expires=datetime.now(UTC).replace(microsecond=0) - timedelta(seconds=1))
    with pytest.raises(TrustError, match="expired metadata"):
        fetch(store, fleet)


def test_changed_metadata_is_refused(store, fleet) -> None:
    fleet.intercept = lambda request, data: data.replace(b"targets", b"targetz") if "snap" in request.name else data
    with pytest.raises(TrustError):
        fetch(store, fleet)


def test_metadata_signed_by_somebody_else_is_refused(store, bundle) -> None:
    stranger = FakeFleet()
    stranger.publish(*bundle)
    with pytest.raises(TrustError, match="without enough valid signatures"):
        fetch(store, stranger)


def test_a_changed_manifest_is_refused(store, fleet) -> None:
    fleet.intercept = lambda request, data: data.replace(b"dent", b"bent") if request.method == "target" else data
    with pytest.raises(TrustError, match="differs from its signed digest"):
        fetch(store, fleet)


def test_endless_data_is_refused(store, fleet) -> None:
    fleet.intercept = lambda request, data: data + bytes(10**6) if request.method == "target" else data
    with pytest.raises(TrustError, match="longer than its signed length"):
        fetch(store, fleet)


def test_a_target_that_nobody_signed_is_refused(store, fleet) -> None:
    with pytest.raises(TrustError, match="no signed metadata lists it"):
        fetch(store, fleet, "lines/press-3/2.json")


def test_another_line_s_manifest_is_refused(store, fleet) -> None:
    with pytest.raises(BundleError, match="wanted for line 'press-4'"):
        store.fetch_manifest(DirectTransport(fleet), "press-4", TARGET)


def test_a_manifest_under_another_version_s_path_is_refused(store, fleet, bundle) -> None:
    folder, manifest = bundle
    other = msgspec.structs.replace(manifest, version=9)
    fleet.publish(folder, other)
    signed = fleet._targets.targets["lines/press-3/9.json"]
    fleet._targets.targets["lines/press-3/2.json"] = type(signed)(signed.length, signed.hashes, "lines/press-3/2.json")
    fleet.targets[f"lines/press-3/{signed.hashes['sha256']}.2.json"] = other.encode()
    fleet.commit()
    with pytest.raises(BundleError, match="version 9"):
        fetch(store, fleet, "lines/press-3/2.json")


def test_lost_metadata_and_a_lost_connection_keep_their_own_errors(store, fleet) -> None:
    del fleet.metadata["timestamp.json"]
    with pytest.raises(NotFoundError):
        fetch(store, fleet)
    transport = DirectTransport(fleet)
    transport.offline = True
    with pytest.raises(NetworkError, match="the broker is not there"):
        store.fetch_manifest(transport, "press-3", TARGET)


def test_a_clock_that_went_back_is_noticed(store, fleet, tmp_path) -> None:
    fetch(store, fleet)
    (tmp_path / "metadata" / "clock-floor").write_text(str(time.time() + 86_400))
    with pytest.raises(TrustError, match="clock went back"):
        fetch(store, fleet)


class TestInAChildProcess:
    @pytest.fixture
    def store(self, fleet, tmp_path) -> TrustStore:
        return TrustStore(tmp_path / "metadata", fleet.root, run_in_child)

    def test_a_signed_manifest_comes_through(self, store, fleet, bundle) -> None:
        assert fetch(store, fleet) == bundle[1]

    def test_a_refusal_keeps_its_kind_and_its_words(self, store, fleet) -> None:
        fleet.intercept = lambda request, data: data.replace(b"dent", b"bent") if request.method == "target" else data
        with pytest.raises(TrustError, match="differs from its signed digest") as caught:
            fetch(store, fleet)
        assert "keeps serving" in caught.value.next_step

    def test_a_lost_connection_is_the_parent_s_own_error(self, store, fleet) -> None:
        transport = DirectTransport(fleet)
        transport.offline = True
        with pytest.raises(NetworkError, match="the broker is not there"):
            store.fetch_manifest(transport, "press-3", TARGET)

    def test_a_missing_file_is_an_answer(self, store, fleet) -> None:
        del fleet.metadata["timestamp.json"]
        with pytest.raises(NotFoundError):
            fetch(store, fleet)

    def test_a_seal_is_checked_there(self, tmp_path) -> None:
        order = SealOrder(str(tmp_path), str(tmp_path), "model.onnx", "sha256:0", "sha256:1")
        with pytest.raises(TrustError, match="public key"):
            run_in_child(order, lambda _request: b"")

    def test_a_child_that_dies_is_not_waited_for(self, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr("sys.executable", "/bin/false")
        with pytest.raises(StateError, match="gave no result"):
            run_in_child(SealOrder("", "", "", "", ""), lambda _request: b"")


def test_a_process_that_hangs_on_the_metadata_is_not_waited_for_for_ever(store, fleet, bundle, monkeypatch) -> None:
    monkeypatch.setattr(module, "LOCK_WAIT_S", 0.1)
    with store._alone(), pytest.raises(NetworkError, match="in use by another process"):
        fetch(store, fleet)
    assert fetch(store, fleet) == bundle[1]
