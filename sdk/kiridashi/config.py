"""A device's settings: one TOML file, checked as a whole before anything is used."""

from __future__ import annotations

import difflib
import ipaddress
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from kiridashi.errors import InputError
from kiridashi.messages import check_name
from kiridashi.runtime.protocol import PREFERENCE, Provider

CONFIG_NAME = "config.toml"

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
_AT = re.compile(r" - at `\$\.([a-z_]+)(?:\[[^\]]*\])*`$")


class DeviceSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[device]``: the enrolled name and the state folder (default: the folder of the file).

    ``device_class`` names the devices that this one's profile holds for; without it the device names its class itself.
    """

    id: str
    state_dir: Path = Path()
    device_class: str | None = None


class BrokerSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[broker]``: where the broker is, and the files of the mutual TLS connection."""

    host: str
    port: Port = 8883
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None


class LineSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[lines.NAME]``: how one line's model runs here.

    ``samples`` is a folder of labelled samples; frames that were named on the device count too. Without any, or with
    ``tune = false``, nothing is tuned.
    ``max_recall_drop`` is the share of its recall that no class may lose by tuning; 1 lets accuracy alone decide.
    ``tune_after`` is how many newly named frames have the agent tune the active model again by itself; 0: never.
    ``tune_seconds`` bounds the iterations of one tuning.
    ``max_accuracy_drop`` is the share of frames that a smaller file may lose against the float file; 1 allows any loss.
    ``providers`` are what may compute the model, best first; a runtime takes the first that it has.
    ``watch`` has the line watched for drift; its reference takes ``reference_frames`` frames that tell of one another
    no more.
    """

    samples: Path | None = None
    runtime: Literal["auto", "onnxruntime", "litert"] = "auto"
    threads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    tune: bool = True
    max_recall_drop: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.1
    tune_after: Annotated[int, msgspec.Meta(ge=0)] = 0
    tune_seconds: Seconds = 300.0
    max_accuracy_drop: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.05
    providers: Annotated[tuple[Provider, ...], msgspec.Meta(min_length=1)] = PREFERENCE
    watch: bool = True
    reference_frames: Annotated[int, msgspec.Meta(ge=100, le=1000)] = 400


class LimitsSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[limits]``: how long to wait, how much to leave free, and what tuning may take.

    ``tune_memory_mib`` is the memory of the tuning process; 0: what is available when it starts, less 64 MiB.
    ``tune_max_celsius`` is how hot the board may be: above it tuning pauses, and ends if it stays hot.

    ``request_timeout_s`` has a low bound, because the agent gives no sign of life while it waits for an answer.
    """

    request_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=60)] = 10.0
    retry_wait_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 15.0
    job_timeout_s: Seconds = 900.0
    watch_every_s: Seconds = 600.0
    window: Annotated[int, msgspec.Meta(ge=1, le=32)] = 4
    free_disk_mib: Annotated[int, msgspec.Meta(ge=0)] = 16
    tune_memory_mib: Annotated[int, msgspec.Meta(ge=0)] = 0
    tune_max_celsius: Annotated[float, msgspec.Meta(gt=0)] = 75.0


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file. All paths are absolute once :func:`load_config` has read it."""

    device: DeviceSection
    broker: BrokerSection
    lines: dict[str, LineSection] = {}
    limits: LimitsSection = LimitsSection()


def load_config(path: Path) -> Config:
    """Read and check a configuration file.

    Raises:
        InputError: no such file, not TOML, an unknown or missing key, a value of the wrong type or out of range, values
            that contradict each other, or a broker on another machine without TLS files. The message names the line.
    """
    try:
        file = _File(path, path.read_text(encoding="utf-8"))
        raw = tomllib.loads(file.text)
    except FileNotFoundError as error:
        raise InputError(
            f"there is no configuration at {path}",
            why="this device is not enrolled, or its state is in another folder",
            next_step="run kiridashi-agent enroll request, or name the folder with --state",
        ) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path} cannot be read as TOML", why=str(error)) from error
    _refuse_unknown(file, raw, Config, ())
    lines = raw.get("lines", {})
    if not isinstance(lines, dict):
        raise InputError(f"{file.at('lines')}: 'lines' holds a table for every line", next_step="write [lines.NAME]")
    config = Config(
        device=_section(file, raw, DeviceSection, "device"),
        broker=_section(file, raw, BrokerSection, "broker"),
        lines={name: _section(file, lines, LineSection, "lines", name) for name in lines},
        limits=_section(file, {"limits": {}} | raw, LimitsSection, "limits"),
    )
    _check(file, config)
    return _absolute(config, path.resolve().parent)


@dataclass(frozen=True)
class _File:
    """The file that is read, for messages that say where."""

    path: Path
    text: str

    def at(self, *keys: str) -> str:
        """``path:line`` of a key: the first line up to which the text is TOML and has it; else the path alone."""
        rows = self.text.splitlines()
        for number in range(1, len(rows) + 1):
            try:
                found: Any = tomllib.loads("\n".join(rows[:number]))
            except tomllib.TOMLDecodeError:
                continue  # in the middle of a value
            for key in keys:
                found = found.get(key) if isinstance(found, dict) else None
            if found is not None:
                return f"{self.path}:{number}"
        return str(self.path)


_Section = TypeVar("_Section", DeviceSection, BrokerSection, LineSection, LimitsSection)


def _section(file: _File, raw: Mapping[str, Any], kind: type[_Section], *keys: str) -> _Section:
    """``raw[keys[-1]]`` as a section; ``keys`` is the way to it from the top of the file."""
    name = ".".join(keys)
    if keys[-1] not in raw:
        step = "kiridashi-agent enroll install writes it"
        raise InputError(f"{file.path}: the section [{name}] is missing", next_step=step)
    table = raw[keys[-1]]
    if isinstance(table, dict):
        _refuse_unknown(file, table, kind, keys)
    try:
        return msgspec.convert(table, kind, dec_hook=_decode_path)
    except msgspec.ValidationError as error:
        key = _AT.search(str(error))
        wrong = (*keys, key[1]) if key else keys
        raise InputError(
            f"{file.at(*wrong)}: '{'.'.join(wrong)}' cannot be used", why=_AT.sub("", str(error))
        ) from error


def render_config(config: Config) -> str:
    """The TOML text of a configuration; keys that stand at their default are left out."""
    sections: list[str] = []
    plain = msgspec.to_builtins(config, enc_hook=str)
    defaults = {"broker": {"port": 8883}, "limits": msgspec.to_builtins(LimitsSection())}
    line_defaults = msgspec.to_builtins(LineSection())
    for name in ("device", "broker", "limits"):
        sections.append(_render(name, plain[name], defaults.get(name, {})))
    for line, section in sorted(plain["lines"].items()):
        sections.append(_render(f"lines.{line}", section, line_defaults))
    return "\n".join(filter(None, sections))


def _render(name: str, section: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    rows = [
        f"{key} = {json.dumps(value, ensure_ascii=False)}"
        for key, value in section.items()
        if value is not None and value != defaults.get(key)
    ]
    if not rows and not name.startswith("lines."):
        return ""
    return "\n".join([f"[{name}]", *rows, ""])


def _refuse_unknown(file: _File, table: Mapping[str, Any], kind: type[msgspec.Struct], keys: tuple[str, ...]) -> None:
    known = [field.name for field in msgspec.structs.fields(kind)]
    for key in table:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            raise InputError(
                f"{file.at(*keys, key)}: the key '{'.'.join((*keys, key))}' is unknown",
                why=f"known here: {', '.join(sorted(known))}",
                next_step=f"did you mean '{'.'.join((*keys, close[0]))}'?" if close else "remove it",
            )


def _decode_path(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise TypeError(f"expected a path in quotes, got {type(value).__name__}")


def _check(file: _File, config: Config) -> None:
    _check_name(file, config.device.id, "device", "device", "id")
    if config.device.device_class is not None:
        _check_name(file, config.device.device_class, "device class", "device", "device_class")
    for line in config.lines:
        _check_name(file, line, "line", "lines", line)
    broker, limits = config.broker, config.limits
    given = [tls for tls in (broker.ca, broker.cert, broker.key) if tls is not None]
    if len(given) not in (0, 3):
        raise InputError(
            f"{file.at('broker')}: broker.ca, broker.cert and broker.key belong together", why="some are missing"
        )
    if not given and not _is_loopback(broker.host):
        raise InputError(
            f"{file.at('broker')}: broker.ca, broker.cert and broker.key are missing for the broker {broker.host}",
            why="it is on another machine: without TLS anybody on the way could read and change messages",
            next_step="install the ticket of the enrolment: kiridashi-agent enroll install",
        )
    if limits.job_timeout_s < limits.request_timeout_s:
        raise InputError(
            f"{file.at('limits', 'job_timeout_s')}: limits.job_timeout_s is below limits.request_timeout_s",
            why=f"{limits.job_timeout_s:g} s for a whole job, and {limits.request_timeout_s:g} s for one answer",
            next_step="give a job minutes (default 900)",
        )


def _check_name(file: _File, name: str, what: str, *keys: str) -> None:
    try:
        check_name(name, what)
    except InputError as error:
        raise InputError(f"{file.at(*keys)}: {error.what}", why=error.why) from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _absolute(config: Config, folder: Path) -> Config:
    replace = msgspec.structs.replace
    broker = config.broker
    files = {
        name: folder / file
        for name, file in (("ca", broker.ca), ("cert", broker.cert), ("key", broker.key))
        if file is not None
    }
    lines = {
        name: replace(line, samples=folder / line.samples) if line.samples is not None else line
        for name, line in config.lines.items()
    }
    device = replace(config.device, state_dir=folder / config.device.state_dir)
    return replace(config, device=device, broker=replace(broker, **files), lines=lines)
