"""The device's own signature: its sealing key, and seals over locally tuned weights.

A tuned model differs from what the server signed, so the device signs it itself: the seal binds the tuned files to the
bundle they came from. A line process checks it at every load and needs only the public key. Signatures are Ed25519
(RFC 8032) over the seal's canonical JSON with an empty signature.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from kiridashi.artifacts import sha256_file, write_atomic
from kiridashi.errors import TrustError

SEAL_FORMAT = "kiridashi-seal/1"
SEAL_NAME = "seal.json"
VALUES_NAME = "tuned.npz"
MAX_SEAL_BYTES = 64 * 1024
_PRIVATE, _PUBLIC = "seal.key", "seal.pub"


class Seal(msgspec.Struct, frozen=True, kw_only=True):
    """The device's statement about tuned weights.

    ``parent`` is the digest of the manifest they were tuned from, ``artifacts`` the SHA-256 of every tuned model file
    by name, ``values`` that of the tuned parameters, accuracies those on the device's hold-out, ``signature`` hex.
    """

    line: str
    device: str
    parent: str
    artifacts: dict[str, str]
    values: str
    accuracy_before: float
    accuracy_after: float
    holdout: int
    format: str = SEAL_FORMAT
    signature: str = ""

    def encode(self) -> bytes:
        """The canonical bytes."""
        return msgspec.json.encode(self, order="sorted")

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical bytes with the signature, as ``sha256:<hex>``: the tuned model's digest."""
        return "sha256:" + hashlib.sha256(self.encode()).hexdigest()

    @property
    def signed_bytes(self) -> bytes:
        """What the signature is over."""
        return msgspec.structs.replace(self, signature="").encode()


def load_or_create_key(state_dir: Path) -> Ed25519PrivateKey:
    """The device's sealing key from ``<state>/trust/seal.key``, made on first use (mode 0600, never overwritten).

    Raises:
        TrustError: the key is readable by others, or is not an Ed25519 key.
    """
    folder = state_dir / "trust"
    path = folder / _PRIVATE
    if not path.exists():
        _create_key(folder)
    if path.stat().st_mode & 0o077:
        raise TrustError(f"{path} can be read by other users", next_step=f"chmod 600 {path}")
    try:
        key = Ed25519PrivateKey.from_private_bytes(path.read_bytes())
    except ValueError as error:
        raise TrustError(f"{path} is not a sealing key", why=str(error)) from error
    public = _public_bytes(key)
    if not (folder / _PUBLIC).exists() or (folder / _PUBLIC).read_bytes() != public:
        write_atomic(folder / _PUBLIC, public)
    return key


def load_public_key(state_dir: Path) -> Ed25519PublicKey:
    """The public half, which line processes read.

    Raises:
        TrustError: there is none, or it is damaged.
    """
    path = state_dir / "trust" / _PUBLIC
    try:
        return Ed25519PublicKey.from_public_bytes(path.read_bytes())
    except (OSError, ValueError) as error:
        raise TrustError(f"the device's public key {path} cannot be read", why=str(error)) from error


def sign_seal(seal: Seal, key: Ed25519PrivateKey) -> Seal:
    """The seal with its signature. Ed25519 is deterministic: same seal, same digest."""
    return msgspec.structs.replace(seal, signature=key.sign(seal.signed_bytes).hex())


def verify_seal(seal: Seal, public_key: Ed25519PublicKey) -> None:
    """Check the signature.

    Raises:
        TrustError: another format, a malformed signature, or one that is not this device's.
    """
    if seal.format != SEAL_FORMAT:
        raise TrustError(f"the seal has the format '{seal.format}', this program reads '{SEAL_FORMAT}'")
    try:
        public_key.verify(bytes.fromhex(seal.signature), seal.signed_bytes)
    except (InvalidSignature, ValueError) as error:
        raise TrustError(
            f"the seal of line '{seal.line}' does not carry this device's signature",
            why="the tuned files were changed, or were tuned on another device",
            next_step="kiridashi-agent undo, then tune again",
        ) from error


def read_seal(folder: Path) -> Seal:
    """Read ``seal.json`` of a tuned folder; its signature is not checked here.

    Raises:
        TrustError: it is missing or malformed.
    """
    path = folder / SEAL_NAME
    try:
        data = path.read_bytes()
        if len(data) > MAX_SEAL_BYTES:
            raise TrustError(f"{path} is larger than {MAX_SEAL_BYTES} bytes")
        return msgspec.json.decode(data, type=Seal)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise TrustError(f"the seal {path} cannot be read", why=str(error)) from error


def check_tuned(folder: Path, artifact: str, parent: str, digest: str, public_key: Ed25519PublicKey) -> Seal:
    """Check a tuned folder before its file is used: signature, parent, digest, and the file itself.

    Args:
        folder: the slot's ``tuned`` folder.
        artifact: the file to be used.
        parent: the digest of the slot's manifest.
        digest: the tuned model's digest, as the active pointer has it.
        public_key: this device's.

    Raises:
        TrustError: any of them does not match.
    """
    seal = read_seal(folder)
    verify_seal(seal, public_key)
    if seal.parent != parent:
        raise TrustError(f"the seal in {folder} belongs to another bundle", why=f"it was tuned from {seal.parent}")
    if seal.digest != digest:
        raise TrustError(f"the seal in {folder} is not the one that was activated", why=f"its digest is {seal.digest}")
    path = folder / artifact
    if artifact not in seal.artifacts or not path.is_file() or sha256_file(path) != seal.artifacts[artifact]:
        raise TrustError(
            f"{path} is not the file that was sealed",
            why="its SHA-256 differs: it was changed or damaged",
            next_step="kiridashi-agent undo, then tune again",
        )
    return seal


def _create_key(folder: Path) -> None:
    """Write a new key beside its place and link it there: of two processes at once, one wins and both use its key."""
    folder.mkdir(parents=True, exist_ok=True)  # open: line applications of other accounts read the public key
    key = Ed25519PrivateKey.generate()
    draft = folder / f".{_PRIVATE}.{secrets.token_hex(8)}.tmp"
    write_atomic(draft, key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption()), mode=0o600)
    try:
        os.link(draft, folder / _PRIVATE)
    except FileExistsError:
        return
    finally:
        draft.unlink()


def _public_bytes(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
