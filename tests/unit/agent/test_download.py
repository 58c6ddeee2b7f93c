"""The download plan, and carrying it out against a fleet in a dictionary."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
from fake_fleet import DirectTransport, FakeFleet
from hypothesis import given
from hypothesis import strategies as st
from kiridashi.artifacts import describe_file, sha256_file
from kiridashi.errors import BundleError, NetworkError, StateError, TrustError
from kiridashi.manifest import CHUNK_BYTES
from kiridashi_agent.download import PART, Place, chunk_places, chunks_in_place, download, plan_download

SIZES = {"one.onnx": 3 * CHUNK_BYTES + 17, "two.tflite": CHUNK_BYTES, "small.npz": 5}


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for seed, (name, size) in enumerate(SIZES.items()):
        (folder / name).write_bytes(random.Random(seed).randbytes(size))
    return folder


@pytest.fixture
def artifacts(source):
    return [describe_file(source / name, "onnx-fp32") for name in SIZES]


@pytest.fixture
def fleet(source, artifacts) -> FakeFleet:
    fleet = FakeFleet()
    for artifact in artifacts:
        data = (source / artifact.name).read_bytes()
        fleet.blobs[artifact.sha256] = [data[n : n + CHUNK_BYTES] for n in range(0, len(data), CHUNK_BYTES)]
    return fleet


@pytest.fixture
def slot(tmp_path) -> Path:
    folder = tmp_path / "slot"
    folder.mkdir()
    return folder


@given(st.sets(st.integers(0, 3)), st.sets(st.integers(0, 3)))
def test_the_plan_covers_every_chunk_exactly_once(done, known) -> None:
    digests = tuple(f"{n:064d}" for n in range(4))
    artifact = msgspec.convert(
        {"name": "m", "kind": "probe", "bytes": 4 * CHUNK_BYTES - 9, "sha256": "0" * 64, "chunks": digests},
        type(describe_file(Path(__file__), "probe")),
    )
    elsewhere = {digests[n]: Place(Path("x"), 0, 1) for n in known}
    (plan,) = plan_download([artifact], {"m": frozenset(done)}, elsewhere)
    assert sorted([*plan.done, *plan.copies, *plan.fetch]) == [0, 1, 2, 3]
    assert set(plan.copies) == known - done
    assert plan.bytes_to_write == sum(CHUNK_BYTES - 9 * (n == 3) for n in {0, 1, 2, 3} - done)


def test_a_first_download_brings_every_file(fleet, slot, source, artifacts) -> None:
    delivery = download(DirectTransport(fleet), slot, artifacts, elsewhere={})
    assert {path.name for path in slot.iterdir()} == set(SIZES)
    assert all(sha256_file(slot / name) == sha256_file(source / name) for name in SIZES)
    assert (delivery.bytes, delivery.chunks, delivery.resumed_chunks) == (sum(SIZES.values()), 6, 0)


def test_a_second_one_fetches_nothing(fleet, slot, artifacts) -> None:
    download(DirectTransport(fleet), slot, artifacts, elsewhere={})
    before = (slot / "one.onnx").stat()
    delivery = download(DirectTransport(fleet), slot, artifacts, elsewhere={})
    assert (delivery.bytes, delivery.chunks, delivery.resumed_chunks) == (0, 0, 6)
    assert (slot / "one.onnx").stat().st_ino == before.st_ino


def test_it_goes_on_from_what_is_right_in_the_part_file(fleet, slot, source, artifacts) -> None:
    whole = (source / "one.onnx").read_bytes()
    # What a power cut may leave: a chunk that arrived, one of zeros, one half written, and nothing after.
    (slot / ("one.onnx" + PART)).write_bytes(whole[:CHUNK_BYTES] + bytes(CHUNK_BYTES) + whole[2 * CHUNK_BYTES :][:999])
    assert chunks_in_place(slot, artifacts[0]) == {0}
    delivery = download(DirectTransport(fleet), slot, artifacts[:1], elsewhere={})
    assert (delivery.chunks, delivery.resumed_chunks) == (3, 1)
    assert (slot / "one.onnx").read_bytes() == whole


def test_a_damaged_finished_file_is_repaired(fleet, slot, source, artifacts) -> None:
    whole = bytearray((source / "one.onnx").read_bytes())
    whole[CHUNK_BYTES] ^= 1
    (slot / "one.onnx").write_bytes(whole)
    assert download(DirectTransport(fleet), slot, artifacts[:1], elsewhere={}).chunks == 1
    assert sha256_file(slot / "one.onnx") == artifacts[0].sha256


def test_chunks_of_the_active_bundle_are_copied_and_damaged_ones_fetched(fleet, slot, source, artifacts, tmp_path):
    manifest = type("Bundle", (), {"artifacts": artifacts})
    places = chunk_places(source, manifest)
    damaged = bytearray((source / "one.onnx").read_bytes())
    damaged[2 * CHUNK_BYTES] ^= 1
    (source / "one.onnx").write_bytes(damaged)
    delivery = download(DirectTransport(fleet), slot, artifacts, elsewhere=places)
    assert (delivery.chunks, delivery.resumed_chunks) == (1, 5)
    assert sha256_file(slot / "one.onnx") == artifacts[0].sha256


def test_two_files_with_the_same_content_are_fetched_once(fleet, slot, artifacts) -> None:
    twin = msgspec.structs.replace(artifacts[1], name="twin.tflite")
    delivery = download(DirectTransport(fleet), slot, [artifacts[1], twin], elsewhere={})
    assert delivery.chunks == 1
    assert sha256_file(slot / "twin.tflite") == sha256_file(slot / "two.tflite")


def test_a_changed_chunk_is_refused_and_not_kept(fleet, slot, artifacts) -> None:
    fleet.intercept = lambda request, data: data[:-1] + b"\x00" if request.index == 2 else data
    with pytest.raises(TrustError, match=r"chunk 2 of 'one\.onnx' was refused"):
        download(DirectTransport(fleet), slot, artifacts, elsewhere={})
    assert not (slot / "one.onnx").exists()
    assert 2 not in chunks_in_place(slot, artifacts[0])


def test_a_chunk_that_the_server_lacks_is_an_incomplete_bundle(fleet, slot, artifacts) -> None:
    del fleet.blobs[artifacts[1].sha256]
    with pytest.raises(BundleError, match="does not have a chunk"):
        download(DirectTransport(fleet), slot, artifacts, elsewhere={})


def test_no_connection_is_not_a_refusal(fleet, slot, artifacts) -> None:
    transport = DirectTransport(fleet)
    transport.offline = True
    with pytest.raises(NetworkError):
        download(transport, slot, artifacts, elsewhere={})


def test_too_little_room_is_found_before_anything_is_fetched(fleet, slot, artifacts) -> None:
    with pytest.raises(StateError, match=r"it needs 1\.0 MiB .* and has"):
        download(DirectTransport(fleet), slot, artifacts, elsewhere={}, keep_free_bytes=2**60)
    assert fleet.requests == []
    assert list(slot.iterdir()) == []
