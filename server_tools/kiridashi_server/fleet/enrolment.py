"""Enrolment, the server's half: from a device's request to the ticket that makes it a member of the fleet."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from kiridashi.enrolment import EnrolRequest, EnrolTicket
from kiridashi.errors import InputError
from kiridashi.messages import check_name

from kiridashi_server.fleet.authority import Authority, read_device_request
from kiridashi_server.fleet.connection import BrokerAddress
from kiridashi_server.fleet.records import Identity
from kiridashi_server.fleet.registry import Registry


def enrol(
    request: EnrolRequest,
    lines: Sequence[str],
    *,
    authority: Authority,
    registry: Registry,
    tuf_root: bytes,
    broker: BrokerAddress,
    now: datetime,
    replace: bool = False,
) -> EnrolTicket:
    """Sign a device's certificate, note the device, and return its ticket.

    The same request again renews the ticket. Other keys under a name that is taken are refused unless
    ``replace`` says that the old device is gone: otherwise anybody could ask for a running device's name.

    Raises:
        InputError: a malformed request, an unknown line, or a name that is taken.
    """
    device = check_name(request.device, "device")
    csr = request.csr_pem.encode()
    key = read_device_request(csr, device).public_key()
    key_der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    key_sha256 = hashlib.sha256(key_der).hexdigest()
    seal_key_pem = _seal_key(request)
    known = registry.device(device)
    if known is not None and not replace:
        same = (known.identity.certificate_key_sha256, known.identity.seal_public_key_pem)
        if same != (key_sha256, seal_key_pem):
            raise InputError(
                f"device '{device}' is enrolled already, with other keys",
                why="the request comes from another device, or the device was set up anew",
                next_step="if the old one is gone, run the same command with --replace",
            )
    certificate = authority.sign_device(csr, device, now)
    identity = Identity(f"{certificate.serial_number:x}", key_sha256, seal_key_pem)
    registry.enrol(device, identity, lines, now)
    return EnrolTicket(
        device=device,
        certificate_pem=certificate.public_bytes(serialization.Encoding.PEM).decode(),
        ca_pem=authority.certificate_pem.decode(),
        tuf_root=tuf_root.decode(),
        broker_host=broker.host,
        broker_port=broker.port,
        lines=tuple(lines),
    )


def _seal_key(request: EnrolRequest) -> str:
    """The seal key as canonical PEM."""
    try:
        key = serialization.load_pem_public_key(request.seal_public_key_pem.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"the seal key of device '{request.device}' cannot be read", why=str(error)) from error
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"the seal key of device '{request.device}' is not an Ed25519 key")
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return pem.decode()
