"""What a memory stick carries to a device without a network: one line's bundle, laid out as the server would answer.

A folder, or one ``.tar`` (POSIX ustar) with the same names inside::

    stick.json                  which line and target (a hint: only signed metadata is believed)
    metadata/<name>             TUF metadata by its name on the wire
    targets/<path>              the manifest
    blobs/<sha256>              the files of the bundle

So whoever reads it asks the same requests as over the network, and checks the same signatures.
"""

from __future__ import annotations

import re

import msgspec

from kiridashi.errors import InputError
from kiridashi.messages import Request

STICK_FORMAT = "kiridashi-stick/1"
INDEX_NAME = "stick.json"
MAX_INDEX_BYTES = 16 * 1024
_NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_METADATA = re.compile(_NAME)
_TARGET = re.compile(rf"{_NAME}(?:/{_NAME}){{0,4}}")
_BLOB = re.compile(r"[0-9a-f]{64}")


class StickIndex(msgspec.Struct, frozen=True, kw_only=True):
    """The content of ``stick.json``.

    Attributes:
        line: whose bundle it is.
        target: TUF target path of the bundle's manifest.
        written: when it was signed, ISO 8601 in UTC.
        valid_until: when the signatures end to be believed.
    """

    line: str
    target: str
    written: str
    valid_until: str
    format: str = STICK_FORMAT

    def encode(self) -> bytes:
        """JSON, for people too."""
        return msgspec.json.format(msgspec.json.encode(self, order="sorted")) + b"\n"


def decode_index(data: bytes, source: str) -> StickIndex:
    """Read ``stick.json``; ``source`` names it in messages.

    Raises:
        InputError: malformed, or of another format.
    """
    try:
        index = msgspec.json.decode(data, type=StickIndex)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InputError(f"{source} cannot be read", why=str(error), next_step=_WRITE_AGAIN) from error
    if index.format != STICK_FORMAT:
        raise InputError(
            f"{source} has the format '{index.format[:80]}', this program reads '{STICK_FORMAT}'",
            next_step="use the same version of Kiridashi on both sides",
        )
    return index


def place_of(request: Request) -> str:
    """The name inside the stick of the file that answers ``request``: never absolute, never upwards.

    Raises:
        InputError: the request is none that a stick can answer, or its name is not a plain one.
    """
    match request.method:
        case "metadata" if _METADATA.fullmatch(request.name):
            return f"metadata/{request.name}"
        case "target" if _TARGET.fullmatch(request.name):
            return f"targets/{request.name}"
        case "chunk" if _BLOB.fullmatch(request.sha256):
            return f"blobs/{request.sha256}"
    raise InputError(f"a stick cannot answer the request '{request.method}' for '{request.name[:80]}'")


_WRITE_AGAIN = "write the stick again on the server: kiridashi fleet export-usb"
