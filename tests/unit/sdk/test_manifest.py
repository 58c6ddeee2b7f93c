"""The manifest: canonical bytes, and everything malformed refused."""

import hashlib
from pathlib import Path

import msgspec
import pytest
from kiridashi.artifacts import describe_file, read_bundle, write_atomic
from kiridashi.budget import Budget
from kiridashi.errors import BundleError
from kiridashi.manifest import CHUNK_BYTES, Artifact, Manifest, Patch, Preprocessing, decode_manifest


def artifact(**changes: object) -> Artifact:
    data = b"x" * 10
    digest = hashlib.sha256(data).hexdigest()
    return msgspec.structs.replace(Artifact("model.onnx", "onnx-fp32", 10, digest, (digest,)), **changes)


def manifest(**changes: object) -> Manifest:
    whole = Manifest(
        line="press-3",
        version=1,
        task="scratches",
        labels=("good", "bad"),
        backbone="tiny",
        backbone_fingerprint="f" * 64,
        layout_digest="a" * 64,
        plan_digest="b" * 64,
        parameters_dense=100,
        parameters_kept=30,
        preprocessing=Preprocessing(8, 8, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)),
        budget=Budget(file_bytes=100),
        artifacts=(artifact(),),
    )
    return msgspec.structs.replace(whole, **changes)


def test_reading_is_the_inverse_of_writing() -> None:
    whole = manifest()
    assert decode_manifest(whole.encode()) == whole
    assert decode_manifest(whole.encode()).digest == whole.digest


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "kiridashi-bundle/9"},
        {"artifacts": (artifact(), artifact())},
        {"artifacts": (artifact(name="../model.onnx"),)},
        {"artifacts": (artifact(name=".hidden"),)},
        {"artifacts": (artifact(sha256="F" * 64),)},
        {"artifacts": (artifact(chunks=()),)},
        {"artifacts": (artifact(bytes=CHUNK_BYTES + 1),)},
        {"artifacts": (artifact(bytes=-1),)},
        {"artifacts": (artifact(patches=(Patch("head.bias", -4, (2,)),)),)},
        {"artifacts": (artifact(patches=(Patch("head.bias", 4, (2, 0)),)),)},
    ],
)
def test_malformed_manifests_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(BundleError):
        decode_manifest(manifest(**changes).encode())


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"\xff", b'{"format":"kiridashi-bundle/1"}'])
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(BundleError, match="not a bundle manifest"):
        decode_manifest(data)


def test_a_bundle_folder_is_checked_byte_by_byte(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x" * 10)
    write_atomic(tmp_path / "manifest.json", manifest().encode())
    assert read_bundle(tmp_path) == manifest()
    (tmp_path / "model.onnx").write_bytes(b"x" * 9 + b"y")
    with pytest.raises(BundleError, match="is not the file"):
        read_bundle(tmp_path)
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(BundleError, match="is missing"):
        read_bundle(tmp_path)


def test_chunks_add_up_to_the_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 1024 * 2 + b"tail"
    (tmp_path / "model.onnx").write_bytes(data)
    described = describe_file(tmp_path / "model.onnx", "onnx-fp32")
    pieces = [data[n : n + CHUNK_BYTES] for n in range(0, len(data), CHUNK_BYTES)]
    assert described.chunks == tuple(hashlib.sha256(piece).hexdigest() for piece in pieces)
    assert described.sha256 == hashlib.sha256(data).hexdigest()


def test_a_failed_atomic_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_atomic(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kiridashi.artifacts.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
