"""Private keys on disk: PEM files that only their owner can read.

Every key file has mode 0600 and lies in a folder of mode 0700. Signing keys of the TUF roles are named by
role and key id, so a key that was written just before a crash, and is named by no metadata yet, is harmless.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from kiridashi.artifacts import write_atomic
from kiridashi.errors import StateError
from securesystemslib.signer import CryptoSigner

KEY_MODE = 0o600
FOLDER_MODE = 0o700


def private_folder(folder: Path) -> Path:
    """Create a folder, or tighten one, so that only its owner can enter it."""
    folder.mkdir(parents=True, exist_ok=True, mode=FOLDER_MODE)
    folder.chmod(FOLDER_MODE)
    return folder


def write_private_key(path: Path, key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> None:
    """Write a key as unencrypted PKCS #8 PEM, mode 0600, in a folder of mode 0700."""
    private_folder(path.parent)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_atomic(path, pem, KEY_MODE)


def read_private_key(path: Path) -> ec.EllipticCurvePrivateKey | Ed25519PrivateKey:
    """Read a key that :func:`write_private_key` wrote.

    Raises:
        StateError: the file is missing, unreadable, or holds another kind of key.
    """
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except FileNotFoundError as error:
        raise StateError(
            f"the private key {path} is missing",
            why="it was moved away, or this folder is not complete",
            next_step="put the key file back for this step, or restore the state folder from its backup",
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise StateError(f"the private key {path} cannot be read", why=str(error)) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey | Ed25519PrivateKey):
        raise StateError(
            f"the private key {path} has an unexpected type",
            why=f"it is a {type(key).__name__}; Kiridashi writes EC P-256 and Ed25519 keys",
        )
    return key


@dataclass(frozen=True)
class SigningKeys:
    """The Ed25519 keys of the TUF roles. Keys of ``root`` and ``targets`` may be kept elsewhere between uses."""

    folder: Path

    def create(self, role: str) -> CryptoSigner:
        """Make and store a new key for a role."""
        key = Ed25519PrivateKey.generate()
        signer = CryptoSigner(key)
        write_private_key(self._path(role, signer.public_key.keyid), key)
        return signer

    def signer(self, role: str, keyids: Iterable[str]) -> CryptoSigner:
        """The signer for one of the key ids that trusted metadata lists for a role.

        Raises:
            StateError: none of these keys is in the folder, or its file is damaged.
        """
        paths = [self._path(role, keyid) for keyid in sorted(keyids)]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise StateError(
                f"there is no signing key of the role '{role}' in {self.folder}",
                why=f"the trusted metadata asks for {' or '.join(path.name for path in paths)}",
                next_step="put that key file back for this step, or restore the state folder from its backup",
            )
        key = read_private_key(path)
        return CryptoSigner(key)

    def has(self, role: str, keyids: Iterable[str]) -> bool:
        """Whether :meth:`signer` would find a key file."""
        return any(self._path(role, keyid).is_file() for keyid in keyids)

    def remove(self, role: str, keyid: str) -> None:
        """Delete a key that no metadata lists any more."""
        self._path(role, keyid).unlink(missing_ok=True)

    def _path(self, role: str, keyid: str) -> Path:
        return self.folder / f"{role}-{keyid[:16]}.pem"
