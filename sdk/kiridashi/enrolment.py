"""Enrolment: the two documents that make a device a member of the fleet.

The device creates its keys and writes an :class:`EnrolRequest`, which holds public parts only; the server
answers with an :class:`EnrolTicket`. Private keys never leave the device, so both documents may travel on a
memory stick.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from kiridashi.errors import InputError
from kiridashi.messages import check_name

REQUEST_FORMAT = "kiridashi-enrol-request/1"
TICKET_FORMAT = "kiridashi-enrol-ticket/1"
MAX_ENROLMENT_BYTES = 256 * 1024


class EnrolRequest(msgspec.Struct, frozen=True):
    """What a device asks with.

    Attributes:
        device: the device's name; also the common name of the CSR's subject.
        csr_pem: PKCS #10 request of the TLS key (EC P-256), PEM. It proves that the device holds the key.
        seal_public_key_pem: Ed25519 public key that checks the device's seals, SubjectPublicKeyInfo PEM.
    """

    device: str
    csr_pem: str
    seal_public_key_pem: str
    format: str = REQUEST_FORMAT


class EnrolTicket(msgspec.Struct, frozen=True):
    """What the server answers with.

    Attributes:
        device: the device's name; the certificate's common name and the broker's user name.
        certificate_pem: client certificate for the request's TLS key, PEM.
        ca_pem: certificate authority that signed the broker's and the devices' certificates, PEM.
        tuf_root: the JSON text of the TUF root metadata that the device pins.
        broker_host: host name or address, as in the broker certificate's subject alternative names.
        broker_port: TLS port of the broker.
        lines: names of the lines that the device serves.
    """

    device: str
    certificate_pem: str
    ca_pem: str
    tuf_root: str
    broker_host: str
    broker_port: int
    lines: tuple[str, ...]
    format: str = TICKET_FORMAT


Document = TypeVar("Document", EnrolRequest, EnrolTicket)


def encode_enrolment(document: EnrolRequest | EnrolTicket) -> bytes:
    """Indented JSON of a request or ticket, for a file that people may look into."""
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def decode_enrolment(data: bytes, kind: type[Document], source: str = "the document") -> Document:
    """Read a request or ticket and check the names in it.

    Raises:
        InputError: too large, malformed, of another format, or with an unsafe device or line name.
    """
    if len(data) > MAX_ENROLMENT_BYTES:
        raise InputError(f"{source} is too large for an enrolment document", why=f"it has {len(data)} bytes")
    try:
        document = msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InputError(f"{source} is not an {kind.__name__}", why=str(error)) from error
    expected = REQUEST_FORMAT if kind is EnrolRequest else TICKET_FORMAT
    if document.format != expected:
        raise InputError(
            f"{source} has the format '{document.format}', this program reads '{expected}'",
            next_step="make it again with a matching version of Kiridashi",
        )
    check_name(document.device, "device")
    if isinstance(document, EnrolTicket):
        for line in document.lines:
            check_name(line, "line")
        if not 0 < document.broker_port < 65536:
            raise InputError(f"{source} names the broker port {document.broker_port}")
    return document
