"""Who the device is: its two keys, its certificate and the pinned root, all below the state folder.

The keys are made here and stay here: ``tls/key.pem`` (EC P-256, for the connection) and the sealing key of
:mod:`kiridashi.trust` (Ed25519, for locally tuned weights), both readable by their owner only.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from kiridashi.artifacts import write_atomic
from kiridashi.config import CONFIG_NAME, BrokerSection, Config, DeviceSection, LineSection, load_config, render_config
from kiridashi.enrolment import EnrolRequest, EnrolTicket
from kiridashi.errors import InputError, StateError, TrustError
from kiridashi.messages import check_name
from kiridashi.trust import load_or_create_key
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root

from kiridashi_agent.metadata import PINNED_ROOT

TLS_KEY, CERTIFICATE, AUTHORITY = Path("tls/key.pem"), Path("tls/certificate.pem"), Path("tls/ca.pem")


def create_request(device: str, state: Path) -> EnrolRequest:
    """Make the device's keys, unless it has them, and the request to be signed by the server.

    Raises:
        InputError: not a valid device name.
        StateError, TrustError: a key file is there but damaged.
    """
    check_name(device, "device")
    tls_key = _read_key(state / TLS_KEY) or _create_key(state / TLS_KEY)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(tls_key, hashes.SHA256())
    seal_public = (
        load_or_create_key(state)
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return EnrolRequest(
        device=device,
        csr_pem=csr.public_bytes(serialization.Encoding.PEM).decode(),
        seal_public_key_pem=seal_public.decode(),
    )


def install_ticket(ticket: EnrolTicket, state: Path, now: datetime) -> Path:
    """Check a ticket against the device's key, store its parts, and return the path of the configuration.

    Everything is checked before anything is written. An existing configuration keeps its own settings of lines and
    limits; address and certificate are replaced.

    Raises:
        StateError: there is no key here (no request was made), or this state belongs to another device.
        TrustError: the certificate is for another key, device or authority, or not valid now; or the root is not
            signed by itself.
        InputError: a part of the ticket cannot be read, or the existing configuration is damaged.
    """
    key = _read_key(state / TLS_KEY)
    if key is None:
        raise StateError(
            f"there is no key in {state}",
            why="the ticket answers a request that was made in another folder or on another device",
            next_step=f"kiridashi-agent enroll request --device {ticket.device} --state {state}",
        )
    _check_certificate(ticket, key, now)
    _check_root(ticket.tuf_root.encode())
    config = _configuration(ticket, state / CONFIG_NAME)
    write_atomic(state / CERTIFICATE, ticket.certificate_pem.encode())
    write_atomic(state / AUTHORITY, ticket.ca_pem.encode())
    write_atomic(state / PINNED_ROOT, ticket.tuf_root.encode())
    write_atomic(state / CONFIG_NAME, render_config(config).encode())
    return state / CONFIG_NAME


def certificate_validity(path: Path) -> tuple[datetime, datetime]:
    """When a PEM certificate begins and ends to be valid.

    Raises:
        InputError: it cannot be read.
    """
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        return certificate.not_valid_before_utc, certificate.not_valid_after_utc
    except (OSError, ValueError) as error:
        raise InputError(f"the certificate {path} cannot be read", why=str(error)) from error


def _create_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_atomic(path, pem, mode=0o600)
    return key


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey | None:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _unusable_key(path, str(error)) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise _unusable_key(path, "it is not an EC key")
    return key


def _unusable_key(path: Path, why: str) -> StateError:
    return StateError(
        f"the private key {path} cannot be used", why=why, next_step="move it away and enrol this device again"
    )


def _check_certificate(ticket: EnrolTicket, key: ec.EllipticCurvePrivateKey, now: datetime) -> None:
    try:
        certificate = x509.load_pem_x509_certificate(ticket.certificate_pem.encode())
        authority = x509.load_pem_x509_certificate(ticket.ca_pem.encode())
    except ValueError as error:
        raise InputError("a certificate in the ticket cannot be read", why=str(error)) from error
    names = [str(name.value) for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if certificate.public_key() != key.public_key():
        why = "its certificate is for another key: another device's ticket, or this device made new keys since"
        raise TrustError("the ticket was refused", why=why, next_step="make a new request and have it signed")
    if names != [ticket.device]:
        raise TrustError("the ticket was refused", why=f"its certificate is for {names}, not '{ticket.device}'")
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError) as error:
        why = "its certificate was not signed by its own authority"
        raise TrustError("the ticket was refused", why=why) from error
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        raise TrustError(
            "the ticket was refused",
            why=f"its certificate is valid from {certificate.not_valid_before_utc:%Y-%m-%d} to "
            f"{certificate.not_valid_after_utc:%Y-%m-%d}, and this device's clock says {now:%Y-%m-%d}",
            next_step="set the device's clock (timedatectl), or have a new ticket made",
        )


def _check_root(data: bytes) -> None:
    try:
        root: Metadata[Root] = Metadata.from_bytes(data)
        if root.signed.type != Root.type:
            raise TrustError(
                "the ticket was refused", why=f"its TUF root is not valid: it is {root.signed.type} metadata"
            )
        root.signed.verify_delegate(Root.type, root.signed_bytes, root.signatures)
    except (RepositoryError, ValueError, TypeError) as error:
        raise TrustError("the ticket was refused", why=f"its TUF root is not valid: {error}") from error


def _configuration(ticket: EnrolTicket, path: Path) -> Config:
    broker = BrokerSection(
        host=ticket.broker_host, port=ticket.broker_port, ca=AUTHORITY, cert=CERTIFICATE, key=TLS_KEY
    )
    lines = {line: LineSection() for line in ticket.lines}
    if not path.is_file():
        return Config(device=DeviceSection(id=ticket.device), broker=broker, lines=lines)
    present = load_config(path)
    if present.device.id != ticket.device:
        raise StateError(
            f"{path.parent} belongs to device '{present.device.id}', the ticket to '{ticket.device}'",
            next_step="use another state folder, or remove the old one if the device was renamed",
        )
    return Config(device=present.device, broker=broker, lines=lines | present.lines, limits=present.limits)
