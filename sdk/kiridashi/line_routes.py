"""What the addresses, headers and errors of the line server mean. Pure."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import unquote, urlsplit

from kiridashi.errors import InputError, KiridashiError, StateError


class RefusedError(Exception):
    """A request that is answered with ``status`` and an error text."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True)
class Place:
    """What a path under ``/v2/models`` names: a line, perhaps its version, and what is asked of it."""

    line: str
    version: str | None
    action: str

    def check(self, serving: int) -> None:
        """Refuse if another version than the one that was asked for is serving."""
        if self.version not in (None, str(serving)):
            raise RefusedError(HTTPStatus.NOT_FOUND, f"line '{self.line}' serves version {serving}, not {self.version}")


def split_url(url: str) -> list[str]:
    """The parts of the path of a request's address."""
    try:
        return [unquote(part) for part in urlsplit(url).path.strip("/").split("/")]
    except ValueError as error:
        raise RefusedError(HTTPStatus.BAD_REQUEST, f"the address cannot be read: {error}") from error


def place_of(path: list[str]) -> Place | None:
    """What ``path`` names, ``None`` if it is not one of a model."""
    match path:
        case ["v2", "models", line, "versions", version, *rest] if len(rest) < 2:
            return Place(line, version, "".join(rest))
        case ["v2", "models", line, *rest] if len(rest) < 2:
            return Place(line, None, "".join(rest))
    return None


def number(text: str, header: str) -> int:
    """The value of a header that holds a count of bytes."""
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise RefusedError(HTTPStatus.BAD_REQUEST, f"{header} is not a number")
    return int(text)


def status_of(error: KiridashiError) -> HTTPStatus:
    """How an error of the SDK is answered: the client's, for later, or the model's."""
    if isinstance(error, InputError):
        return HTTPStatus.BAD_REQUEST
    if isinstance(error, StateError):
        return HTTPStatus.SERVICE_UNAVAILABLE
    return HTTPStatus.INTERNAL_SERVER_ERROR


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine reach ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
