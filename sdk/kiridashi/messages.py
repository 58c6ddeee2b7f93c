"""The wire protocol: MQTT topics and message bodies, version 1.2.

Everything that crosses the broker is defined here, for both sides. ``desired`` and ``state`` are retained JSON;
requests go to ``rpc`` as JSON, replies come to ``rx`` as raw bytes with the request's correlation data and a user
property ``status``. A reply's topic is derived from the request's topic, which the broker's access list binds to
the device certificate; it is never taken from the payload.

Version 1.1 added the profiles: ``Desired.probes``, ``Reported.probes`` and the request ``report``. A side that speaks
1.0 ignores the fields and never makes the request. Version 1.2 added ``Reported.drift``.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeVar

import msgspec

from kiridashi.budget import Measurement, Verdict
from kiridashi.drift.report import LineDrift
from kiridashi.errors import InputError

PROTOCOL = "1.2"
PREFIX = "kiri/v1"
RPC_FILTER = f"{PREFIX}/d/+/rpc"
STATE_FILTER = f"{PREFIX}/d/+/state"
ONLINE_FILTER = f"{PREFIX}/d/+/online"
EVENT_FILTER = f"{PREFIX}/d/+/evt/+"
MAX_MESSAGE_BYTES = 512 * 1024
MAX_CONTROL_BYTES = 64 * 1024
STATUS_PROPERTY = "status"
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
LineName = Annotated[str, msgspec.Meta(pattern=rf"^{_NAME.pattern}\Z")]
_PROBES = re.compile(r"probes/([0-9a-f]{64})\.json")

DeviceTopic = Literal["desired", "state", "online", "rpc", "rx"]
ReplyStatus = Literal["ok", "not-found", "refused", "error"]
Phase = Literal[
    "idle",
    "fetching",
    "downloading",
    "probing",
    "measuring",
    "tuning",
    "validating",
    "activating",
    "active",
    "rejected",
    "rolled-back",
]
ProfilePhase = Literal["waiting", "fetching", "measuring", "sending", "sent", "failed"]


def check_name(name: str, what: str) -> str:
    """Return a device or line name that is safe in topics, file names and certificates.

    Raises:
        InputError: not 1 to 63 lower-case letters, digits and inner hyphens.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            f"'{name}' is not a valid {what} name",
            why="names are 1 to 63 lower-case letters, digits and hyphens, and start and end with a letter or digit",
        )
    return name


def device_topic(device: str, kind: DeviceTopic) -> str:
    """``kiri/v1/d/<device>/<kind>``."""
    return f"{PREFIX}/d/{check_name(device, 'device')}/{kind}"


def event_topic(device: str, event: str) -> str:
    """``kiri/v1/d/<device>/evt/<event>``."""
    return f"{PREFIX}/d/{check_name(device, 'device')}/evt/{check_name(event, 'event')}"


def device_of(topic: str) -> str:
    """The device that a ``kiri/v1/d/<device>/…`` topic belongs to.

    Raises:
        InputError: another topic.
    """
    parts = topic.split("/")
    if len(parts) < 5 or "/".join(parts[:2]) != PREFIX or parts[2] != "d":
        raise InputError(f"'{topic}' is not a device topic")
    return check_name(parts[3], "device")


def target_path(line: str, version: int) -> str:
    """The TUF target path of a line's manifest: ``lines/<line>/<version>.json``."""
    return f"lines/{check_name(line, 'line')}/{version}.json"


def probes_path(digest: str) -> str:
    """The TUF target path of a probe set, which is named by its own digest: ``probes/<sha256>.json``."""
    return f"probes/{digest}.json"


def digest_in(path: str) -> str:
    """The digest of the probe set that a target path of :func:`probes_path` names.

    Raises:
        InputError: another path.
    """
    match = _PROBES.fullmatch(path)
    if match is None:
        raise InputError(f"'{path[:160]}' is not the path of a probe set", why="that is probes/<sha256>.json")
    return match[1]


class LineDesired(msgspec.Struct, frozen=True):
    """What one line on the device should run: the TUF target path of its manifest."""

    target: str
    rollout: str = ""


class ProbesDesired(msgspec.Struct, frozen=True):
    """A profile that the server asks for: measure this probe set.

    Attributes:
        target: the TUF target path of the probe set.
        request: grows with every request to this device; the same set is measured again only for another one.
        seconds: what measuring may take, all starts together.
        threads: inside one prediction.
    """

    target: str
    request: int
    seconds: float
    threads: int


class Desired(msgspec.Struct, frozen=True):
    """What the server wants of one device. ``generation`` only grows; ``probes`` is 1.1."""

    generation: int
    lines: dict[LineName, LineDesired]
    protocol: str = PROTOCOL
    probes: ProbesDesired | None = None


class ErrorReport(msgspec.Struct, frozen=True):
    """An error as the device saw it, by class name and exit code."""

    kind: str
    code: int
    message: str
    phase: str = ""


class Delivery(msgspec.Struct, frozen=True):
    """What fetching a bundle took: payload bytes and chunks received, chunks already there, wall seconds."""

    bytes: int
    chunks: int
    resumed_chunks: int
    seconds: float


class VariantCost(msgspec.Struct, frozen=True):
    """What one size of the train step costs this device, and what became of it.

    ``peak_bytes`` is the estimate for the whole process. ``seconds`` are those of all iterations: measured if it ran,
    otherwise scaled from one that did; 0 where none did. ``outcome`` says why it was taken or not.
    """

    name: str
    peak_bytes: int
    seconds: float
    outcome: str


class TuneReport(msgspec.Struct, frozen=True):
    """What local tuning did. Accuracies are on the device's own hold-out, as shares of 1.

    ``accuracy_before`` is that of the shipped file, or of the tuned one where that was serving.

    Attributes:
        bound: what ended the iterations early: "time", "temperature", "overfitting", "divergence", or nothing.
        best_iteration: the one after which the weights were taken: the last, unless that was clearly worse.
        paused_s: seconds for which the board was too hot to go on.
        celsius: the highest temperature seen; ``None`` where the board has no sensor.
        sources: samples by where they came from: "files", "given", "named", "kept".
        stale: files of the bundle that do not have the tuned weights; they are not used while those serve.
        stale_reasons: by the name of such a file, why it does not have them.
        variant: the size of the train step that ran, ``head`` if only the closed form was used.
        variants: all sizes that the bundle has.
    """

    iterations: int
    seconds: float
    samples: int
    holdout: int
    accuracy_before: float
    accuracy_head: float
    accuracy_after: float
    loss_first: float
    loss_last: float
    peak_rss_bytes: int
    kept: bool
    reason: str
    worst_recall_drop: float = 0.0
    bound: str = ""
    paused_s: float = 0.0
    celsius: float | None = None
    sources: dict[str, int] = {}
    stale: tuple[str, ...] = ()
    variant: str = ""
    variants: tuple[VariantCost, ...] = ()
    best_iteration: int = 0
    stale_reasons: dict[str, str] = {}


class AccuracyCheck(msgspec.Struct, frozen=True):
    """Whether a smaller file is as good as the float file, on this device.

    Attributes:
        basis: "holdout": the device's own labelled frames; "probe": the bundle's known frames, which have no labels, so
            a frame counts as lost when the best class differs.
        samples: frames that were compared.
        reference: the float file.
        drop: share of the frames that were lost, less those that were won.
        allowed: ``max_accuracy_drop`` of the line.
        passed: no more is lost than allowed, or no more than chance explains.
        reason: the numbers in words.
    """

    basis: Literal["holdout", "probe"]
    samples: int
    reference: str
    drop: float
    allowed: float
    passed: bool
    reason: str


class ArtifactTrial(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the device found of one file of the bundle, and why it was chosen or not.

    Attributes:
        artifact: the file's name.
        chosen: whether it is the one that goes live untuned, or is tuned.
        reason: why, in words.
        provider: what computed it; empty if it was not measured.
        latency_p95_ms, memory_bytes, within: as measured, and whether that is inside the budget.
        accuracy: how it compares with the float file; ``None`` for a float file, and where its probe failed.
    """

    artifact: str
    chosen: bool = False
    reason: str = ""
    provider: str = ""
    latency_p95_ms: float | None = None
    memory_bytes: int | None = None
    within: bool | None = None
    accuracy: AccuracyCheck | None = None


class LineState(msgspec.Struct, frozen=True):
    """What is true of one line on the device.

    ``tune`` is the last tuning, that of the target or a later one of the model that serves. ``tuning`` says in words
    what it came to, or why weights that were tuned here are given up with this target; empty if there is nothing to
    say.
    ``trials`` are the files that this device could run, each with what became of it.
    """

    phase: Phase
    target: str = ""
    version: int = 0
    slot: str = ""
    artifact: str = ""
    model_digest: str = ""
    tuned: bool = False
    measured: Measurement | None = None
    verdict: Verdict | None = None
    tune: TuneReport | None = None
    delivery: Delivery | None = None
    error: ErrorReport | None = None
    tuning: str = ""
    trials: tuple[ArtifactTrial, ...] = ()


class ProbesState(msgspec.Struct, frozen=True):
    """How far the device is with a profile that it was asked for.

    ``waiting``: a line's update goes first. ``sending``: measured, and the server has not said yet that it has it.
    ``done`` of ``total`` steps is how far measuring has come; both are 0 otherwise.
    """

    target: str
    request: int
    phase: ProfilePhase
    done: int = 0
    total: int = 0
    error: ErrorReport | None = None


class Reported(msgspec.Struct, frozen=True):
    """What the device says is true; the server reconciles by ``generation``.

    ``probes`` is 1.1. ``drift`` is 1.2: the watch of each line that is watched.
    """

    device: str
    generation: int
    lines: dict[str, LineState]
    agent_version: str
    idle_rss_bytes: int = 0
    modules_forbidden_loaded: tuple[str, ...] = ()
    protocol: str = PROTOCOL
    probes: ProbesState | None = None
    drift: dict[str, LineDrift] = {}


class Request(msgspec.Struct, frozen=True):
    """A device's request. ``metadata`` and ``target`` name a TUF file, ``chunk`` a blob and an index in it.

    ``report`` (1.1) hands over the profile that request number ``index`` asked for: ``body`` is the JSON of a
    :class:`kiridashi.probes.ProbeReport`. The answer ``ok`` says that it is stored; asking again is harmless.
    """

    method: Literal["metadata", "target", "chunk", "report"]
    name: str = ""
    sha256: str = ""
    index: int = 0
    protocol: str = PROTOCOL
    body: msgspec.Raw = msgspec.Raw(b"null")


Message = TypeVar("Message", Desired, Reported, Request)


def encode(message: Desired | Reported | Request) -> bytes:
    """JSON bytes of a message, keys sorted."""
    return msgspec.json.encode(message, order="sorted")


def decode(data: bytes, kind: type[Message]) -> Message:
    """Read one message.

    Raises:
        InputError: too large, malformed, or of another protocol major version.
    """
    if len(data) > MAX_CONTROL_BYTES:
        raise InputError(f"a {kind.__name__} message of {len(data)} bytes was refused", why="it is over 64 KiB")
    try:
        message = msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InputError(f"a {kind.__name__} message cannot be read", why=str(error)) from error
    if message.protocol.split(".")[0] != PROTOCOL.split(".")[0]:
        raise InputError(
            f"a {kind.__name__} message speaks protocol {message.protocol}, this program {PROTOCOL}",
            next_step="update the older side first",
        )
    return message
