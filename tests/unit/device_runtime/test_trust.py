from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from kiridashi.artifacts import sha256_file
from kiridashi.errors import TrustError
from kiridashi.trust import (
    SEAL_NAME,
    Seal,
    check_tuned,
    load_or_create_key,
    load_public_key,
    read_seal,
    sign_seal,
    verify_seal,
)

SEAL = Seal(
    line="press-3",
    device="dev-1",
    parent="sha256:" + "a" * 64,
    artifacts={"model.onnx": "b" * 64},
    values="c" * 64,
    accuracy_before=0.5,
    accuracy_after=0.75,
    holdout=8,
)


def test_key_is_private_and_made_once(tmp_path: Path) -> None:
    first, second = load_or_create_key(tmp_path), load_or_create_key(tmp_path)
    assert first.private_bytes_raw() == second.private_bytes_raw()
    assert (tmp_path / "trust" / "seal.key").stat().st_mode & 0o777 == 0o600
    public = load_public_key(tmp_path)
    assert public.public_bytes(Encoding.Raw, PublicFormat.Raw) == first.public_key().public_bytes_raw()


def test_makers_at_the_same_time_get_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = {key.private_bytes_raw() for key in pool.map(lambda _: load_or_create_key(tmp_path), range(16))}
    assert len(keys) == 1
    assert sorted(path.name for path in (tmp_path / "trust").iterdir()) == ["seal.key", "seal.pub"]


def test_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    load_or_create_key(tmp_path)
    (tmp_path / "trust" / "seal.key").chmod(0o640)
    with pytest.raises(TrustError) as caught:
        load_or_create_key(tmp_path)
    assert "chmod 600" in caught.value.next_step


def test_damaged_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrustError, match=r"seal\.pub"):
        load_public_key(tmp_path)
    load_or_create_key(tmp_path)
    (tmp_path / "trust" / "seal.key").write_bytes(b"short")
    with pytest.raises(TrustError, match="not a sealing key"):
        load_or_create_key(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"line": "press-4"},
        {"device": "dev-2"},
        {"parent": "sha256:" + "d" * 64},
        {"artifacts": {"model.onnx": "e" * 64}},
        {"values": "f" * 64},
        {"accuracy_after": 0.76},
        {"holdout": 9},
        {"format": "kiridashi-seal/2"},
        {"signature": ""},
        {"signature": "no hex"},
        {"signature": "00" * 64},
    ],
)
def test_any_change_breaks_the_seal(tmp_path: Path, change: dict[str, Any]) -> None:
    key = load_or_create_key(tmp_path)
    signed = sign_seal(SEAL, key)
    verify_seal(signed, key.public_key())
    with pytest.raises(TrustError):
        verify_seal(msgspec.structs.replace(signed, **change), key.public_key())


def test_another_devices_seal_is_refused(tmp_path: Path) -> None:
    signed = sign_seal(SEAL, load_or_create_key(tmp_path / "one"))
    with pytest.raises(TrustError, match="this device's signature"):
        verify_seal(signed, load_or_create_key(tmp_path / "two").public_key())


def test_same_seal_same_digest(tmp_path: Path) -> None:
    key = load_or_create_key(tmp_path)
    assert sign_seal(SEAL, key).digest == sign_seal(SEAL, key).digest
    assert sign_seal(SEAL, key).digest != SEAL.digest


def test_tuned_folder_is_checked_whole(tmp_path: Path) -> None:
    key = load_or_create_key(tmp_path)
    file = tmp_path / "model.onnx"
    file.write_bytes(b"weights")
    signed = sign_seal(msgspec.structs.replace(SEAL, artifacts={"model.onnx": sha256_file(file)}), key)
    (tmp_path / SEAL_NAME).write_bytes(signed.encode())
    check = (tmp_path, "model.onnx", signed.parent, signed.digest, key.public_key())
    assert check_tuned(*check) == signed
    with pytest.raises(TrustError, match="another bundle"):
        check_tuned(*check[:2], "sha256:" + "0" * 64, *check[3:])
    with pytest.raises(TrustError, match="not the one that was activated"):
        check_tuned(*check[:3], "sha256:" + "0" * 64, check[4])
    with pytest.raises(TrustError, match="not the file that was sealed"):
        check_tuned(tmp_path, "other.onnx", *check[2:])
    file.write_bytes(b"weighty")
    with pytest.raises(TrustError, match="not the file that was sealed"):
        check_tuned(*check)


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 70_000])
def test_malformed_seals_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SEAL_NAME).write_bytes(content)
    with pytest.raises(TrustError):
        read_seal(tmp_path)
