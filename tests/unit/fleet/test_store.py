"""The content-addressed store."""

from __future__ import annotations

import hashlib

import pytest
from kiridashi.errors import BundleError
from kiridashi.manifest import CHUNK_BYTES
from kiridashi_server.fleet.store import MAX_CHUNK_INDEX, BlobStore

CONTENT = bytes(range(256)) * 2500  # two whole chunks and a part


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(CONTENT)
    return path


DIGEST = hashlib.sha256(CONTENT).hexdigest()


def test_chunks_are_read_by_digest_and_index(tmp_path, source):
    store = BlobStore(tmp_path / "store")
    assert store.add(source, DIGEST) is True
    assert store.add(source, DIGEST) is False
    pieces = [store.read_chunk(DIGEST, index) for index in range(3)]
    assert b"".join(pieces) == CONTENT
    assert [len(piece) for piece in pieces] == [CHUNK_BYTES, CHUNK_BYTES, len(CONTENT) - 2 * CHUNK_BYTES]
    assert store.read_chunk(DIGEST, 3) is None
    assert store.read_chunk(DIGEST, -1) is None
    assert store.read_chunk(DIGEST, MAX_CHUNK_INDEX) is None
    assert store.read_chunk("0" * 64, 0) is None


def test_a_file_with_another_digest_leaves_no_trace(tmp_path, source):
    store = BlobStore(tmp_path / "store")
    with pytest.raises(BundleError, match="changed or damaged"):
        store.add(source, "0" * 64)
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


def test_an_interrupted_copy_is_not_a_blob(tmp_path, source, monkeypatch):
    store = BlobStore(tmp_path / "store")

    def cut(_descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", cut)
    with pytest.raises(KeyboardInterrupt):
        store.add(source, DIGEST)
    monkeypatch.undo()
    assert not store.has(DIGEST)
    assert store.add(source, DIGEST)


@pytest.mark.parametrize("name", ["", "../x", "A" * 64, "0" * 63, "0" * 65])
def test_what_is_no_digest_has_no_path(tmp_path, name):
    with pytest.raises(BundleError, match="not a SHA-256"):
        BlobStore(tmp_path).path(name)


def test_a_replaced_blob_is_read_anew(tmp_path, source):
    store = BlobStore(tmp_path / "store")
    store.add(source, DIGEST)
    assert store.read_chunk(DIGEST, 0) == CONTENT[:CHUNK_BYTES]
    store.path(DIGEST).write_bytes(b"rotten")
    assert store.read_chunk(DIGEST, 0) == b"rotten"
