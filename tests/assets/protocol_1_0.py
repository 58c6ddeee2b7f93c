"""The messages of protocol 1.0 as they were, for what an older device or server makes of today's."""

from __future__ import annotations

from typing import Literal

import msgspec


class LineDesired(msgspec.Struct, frozen=True):
    target: str
    rollout: str = ""


class Desired(msgspec.Struct, frozen=True):
    generation: int
    lines: dict[str, LineDesired]
    protocol: str = "1.0"


class LineState(msgspec.Struct, frozen=True):
    phase: str
    target: str = ""
    version: int = 0


class Reported(msgspec.Struct, frozen=True):
    device: str
    generation: int
    lines: dict[str, LineState]
    agent_version: str
    idle_rss_bytes: int = 0
    modules_forbidden_loaded: tuple[str, ...] = ()
    protocol: str = "1.0"


class Request(msgspec.Struct, frozen=True):
    method: Literal["metadata", "target", "chunk"]
    name: str = ""
    sha256: str = ""
    index: int = 0
    protocol: str = "1.0"


def decode(data: bytes, kind: type) -> msgspec.Struct:
    """As 1.0 read a message: unknown fields are ignored, another major version is refused."""
    message = msgspec.json.decode(data, type=kind)
    if message.protocol.split(".")[0] != "1":
        raise ValueError(message.protocol)
    return message


def encode(message: msgspec.Struct) -> bytes:
    """As 1.0 wrote a message."""
    return msgspec.json.encode(message, order="sorted")
