"""Devices, lines, releases and reports, in one database.

The registry is the truth about what is wanted; the device is the truth about what is. Numbers that devices
compare (generations) only grow, also when the database was restored from an older backup.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

import msgspec
from kiridashi.errors import InputError
from kiridashi.messages import Desired, Reported, check_name, encode
from sqlalchemy import Connection, RowMapping, delete, exists, insert, select, update

from kiridashi_server.fleet.database import next_generation, note_event, stamp, transaction
from kiridashi_server.fleet.desired import desired_for
from kiridashi_server.fleet.profiles import ProfileBook, is_asked_to_read, wanted_probes
from kiridashi_server.fleet.records import Device, Event, Identity, Line, Release
from kiridashi_server.fleet.tables import ASSIGNMENT, DEVICE, EVENT, LINE, RELEASE, RELEASE_BLOB, open_engine

_MAX_GENERATION = 2**53


class Registry:
    """The fleet's database. Every method is one transaction; instances may be shared by threads."""

    def __init__(self, url: str) -> None:
        self._engine = open_engine(url)
        self._writer = self._engine.execution_options(writes=True)
        self.profiles = ProfileBook(self._engine)

    def close(self) -> None:
        """Give back all database connections."""
        self._engine.dispose()

    # Lines and releases

    def add_line(self, name: str, now: datetime) -> bool:
        """Add a line; ``False`` if it was there."""
        check_name(name, "line")
        with transaction(self._writer) as db:
            if db.execute(select(LINE.c.name).where(LINE.c.name == name)).first():
                return False
            db.execute(insert(LINE).values(name=name, created=stamp(now)))
            return True

    def lines(self) -> tuple[Line, ...]:
        """All lines by name."""
        with transaction(self._engine) as db:
            rows = db.execute(select(LINE).order_by(LINE.c.name)).mappings()
            return tuple(Line(row["name"], row["created"], row["offered"]) for row in rows)

    def add_release(self, release: Release, blobs: Iterable[str]) -> Release:
        """Note a release and the digests of its artifacts; one that is there is returned as it is.

        Raises:
            InputError: the line does not exist.
        """
        with transaction(self._writer) as db:
            self._require_lines(db, [release.line])
            place = (RELEASE.c.line == release.line) & (RELEASE.c.version == release.version)
            if row := db.execute(select(RELEASE).where(place)).mappings().first():
                return Release(**row)
            db.execute(insert(RELEASE).values(**asdict(release)))
            for sha256 in sorted(set(blobs)):
                db.execute(insert(RELEASE_BLOB).values(sha256=sha256, line=release.line, version=release.version))
            return release

    def releases(self, line: str | None = None) -> tuple[Release, ...]:
        """Releases of one line or of all, ordered by line and version."""
        query = select(RELEASE).order_by(RELEASE.c.line, RELEASE.c.version)
        with transaction(self._engine) as db:
            rows = db.execute(query.where(RELEASE.c.line == line) if line else query).mappings()
            return tuple(Release(**row) for row in rows)

    # Devices

    def enrol(self, device: str, identity: Identity, lines: Sequence[str], now: datetime) -> None:
        """Add a device with its lines, or renew the identity and the lines of one that is there.

        Raises:
            InputError: one of the lines does not exist.
        """
        check_name(device, "device")
        keys = asdict(identity)
        with transaction(self._writer) as db:
            self._require_lines(db, lines)
            if db.execute(select(DEVICE.c.name).where(DEVICE.c.name == device)).first():
                db.execute(update(DEVICE).where(DEVICE.c.name == device).values(**keys))
            else:
                fresh = {"name": device, "enrolled": stamp(now), "generation": 0, "sent_generation": 0}
                db.execute(insert(DEVICE).values(**fresh, **keys))
            self._assign(db, device, lines)
            note_event(db, device, "enrolled", ",".join(lines), now)

    def assign(self, device: str, lines: Sequence[str], now: datetime) -> None:
        """Make ``lines`` the lines of a device: new ones get their line's offered version, others end.

        Raises:
            InputError: an unknown device or line.
        """
        with transaction(self._writer) as db:
            if not db.execute(select(DEVICE.c.name).where(DEVICE.c.name == device)).first():
                raise InputError(f"there is no device '{device}'", next_step="kiridashi fleet enroll REQUEST -o TICKET")
            self._require_lines(db, lines)
            self._assign(db, device, lines)
            note_event(db, device, "assigned", ",".join(lines), now)

    def want(self, line: str, version: int, now: datetime, devices: Sequence[str] | None = None) -> int:
        """Want a published version on some devices, or (``None``) on all of the line and on later ones.

        Returns how many devices were given a new generation; those that want this version already keep theirs.

        Raises:
            InputError: the version is not published, or a device does not serve the line.
        """
        with transaction(self._writer) as db:
            place = (RELEASE.c.line == line) & (RELEASE.c.version == version)
            if not db.execute(select(RELEASE.c.line).where(place)).first():
                raise InputError(
                    f"version {version} of line '{line}' is not published",
                    next_step=f"kiridashi publish BUNDLE --line {line}",
                )
            if devices is None:
                db.execute(update(LINE).where(LINE.c.name == line).values(offered=version))
            serving = {
                row.device: row.wanted for row in db.execute(select(ASSIGNMENT).where(ASSIGNMENT.c.line == line))
            }
            chosen = list(serving) if devices is None else list(devices)
            for device in chosen:
                if device not in serving:
                    raise InputError(
                        f"device '{device}' does not serve line '{line}'",
                        next_step=f"kiridashi fleet assign {device} --lines {line}",
                    )
            changed = [device for device in chosen if serving[device] != version]
            for device in changed:
                here = (ASSIGNMENT.c.device == device) & (ASSIGNMENT.c.line == line)
                db.execute(update(ASSIGNMENT).where(here).values(wanted=version))
                next_generation(db, device)
                note_event(db, device, "wanted", f"{line} {version}", now)
            return len(changed)

    def devices(self) -> tuple[Device, ...]:
        """All devices by name."""
        with transaction(self._engine) as db:
            rows = db.execute(select(DEVICE).order_by(DEVICE.c.name)).mappings().all()
            wanted: dict[str, dict[str, int | None]] = {row["name"]: {} for row in rows}
            for row in db.execute(select(ASSIGNMENT).order_by(ASSIGNMENT.c.line)):
                wanted[row.device][row.line] = row.wanted
            return tuple(_device(row, wanted[row["name"]]) for row in rows)

    def device(self, name: str) -> Device | None:
        """One device, or ``None``."""
        with transaction(self._engine) as db:
            row = db.execute(select(DEVICE).where(DEVICE.c.name == name)).mappings().first()
            return _device(row, _wanted(db, name)) if row else None

    def events(self, device: str, limit: int = 100) -> tuple[Event, ...]:
        """A device's history, newest first."""
        query = select(EVENT).where(EVENT.c.device == device).order_by(EVENT.c.id.desc()).limit(limit)
        with transaction(self._engine) as db:
            return tuple(Event(row.device, row.kind, row.at, row.payload) for row in db.execute(query))

    # What the distribution asks and notes

    def desired(self, device: str) -> Desired | None:
        """The desired state of a device as it is now, ``None`` for an unknown device."""
        with transaction(self._engine) as db:
            generation = db.execute(select(DEVICE.c.generation).where(DEVICE.c.name == device)).scalar()
            if generation is None:
                return None
            lines = _wanted(db, device)
            rows = db.execute(select(RELEASE).where(RELEASE.c.line.in_(lines))).mappings()
            return desired_for(lines, [Release(**row) for row in rows], generation, wanted_probes(db, device))

    def lines_of(self, device: str) -> frozenset[str]:
        """The lines that a device serves; empty for an unknown device."""
        with transaction(self._engine) as db:
            return frozenset(_wanted(db, device))

    def may_read(self, device: str, sha256: str) -> bool:
        """Whether an artifact belongs to a release of a line that the device serves, or to what it is to measure."""
        join = (RELEASE_BLOB.c.line == ASSIGNMENT.c.line) & (RELEASE_BLOB.c.sha256 == sha256)
        query = select(exists().where(join & (ASSIGNMENT.c.device == device)))
        with transaction(self._engine) as db:
            return bool(db.execute(query).scalar()) or is_asked_to_read(db, device, sha256)

    def probes_of(self, device: str) -> str | None:
        """The digest of the probe set that a device is to measure."""
        request = self.profiles.request_of(device)
        return request.probes if request is not None and request.answered is None else None

    def unsent(self) -> tuple[str, ...]:
        """Devices whose newest desired state the broker has not acknowledged."""
        query = select(DEVICE.c.name).where(DEVICE.c.sent_generation < DEVICE.c.generation)
        with transaction(self._engine) as db:
            return tuple(db.execute(query.order_by(DEVICE.c.name)).scalars())

    def mark_sent(self, device: str, generation: int) -> None:
        """Note that the broker has a device's desired state of this generation."""
        older = (DEVICE.c.name == device) & (DEVICE.c.sent_generation < generation)
        with transaction(self._writer) as db:
            db.execute(update(DEVICE).where(older).values(sent_generation=generation))

    def record_report(self, report: Reported, now: datetime) -> bool:
        """Keep what a device says of itself; ``False`` for an unknown device.

        A report of a generation that this registry has not given out yet (it was restored from a backup) moves
        the device's generation beyond it, so that the device does not take the next desired state for an old one.
        """
        with transaction(self._writer) as db:
            known = db.execute(select(DEVICE.c.generation).where(DEVICE.c.name == report.device)).scalar()
            if known is None:
                return False
            values: dict[str, Any] = {"reported": encode(report).decode(), "reported_at": stamp(now)}
            if known < report.generation < _MAX_GENERATION:
                values["generation"] = report.generation + 1
            db.execute(update(DEVICE).where(DEVICE.c.name == report.device).values(**values))
            return True

    def record_online(self, device: str, *, online: bool) -> None:
        """Note whether a device is connected."""
        with transaction(self._writer) as db:
            db.execute(update(DEVICE).where(DEVICE.c.name == device).values(online=online))

    def record_event(self, device: str, kind: str, payload: str, now: datetime) -> bool:
        """Add to a device's history, of which the newest 1000 entries are kept; ``False`` for an unknown device."""
        with transaction(self._writer) as db:
            if not db.execute(select(DEVICE.c.name).where(DEVICE.c.name == device)).first():
                return False
            note_event(db, device, kind, payload, now)
            return True

    def _require_lines(self, db: Connection, lines: Sequence[str]) -> None:
        known = set(db.execute(select(LINE.c.name)).scalars())
        for line in lines:
            if line not in known:
                raise InputError(
                    f"there is no line '{line}'",
                    why=f"known lines: {', '.join(sorted(known)) or 'none'}",
                    next_step=f"kiridashi line add {line}",
                )

    def _assign(self, db: Connection, device: str, lines: Sequence[str]) -> None:
        before = _wanted(db, device)
        gone, new = set(before) - set(lines), sorted(set(lines) - set(before))
        here = ASSIGNMENT.c.device == device
        db.execute(delete(ASSIGNMENT).where(here & ASSIGNMENT.c.line.in_(gone)))
        offered = {row.name: row.offered for row in db.execute(select(LINE))}
        for line in new:
            db.execute(insert(ASSIGNMENT).values(device=device, line=line, wanted=offered[line]))
        if gone or new:
            next_generation(db, device)


def _wanted(db: Connection, device: str) -> dict[str, int | None]:
    query = select(ASSIGNMENT).where(ASSIGNMENT.c.device == device).order_by(ASSIGNMENT.c.line)
    return {row.line: row.wanted for row in db.execute(query)}


def _device(row: RowMapping, lines: dict[str, int | None]) -> Device:
    identity = Identity(row["certificate_serial"], row["certificate_key_sha256"], row["seal_public_key_pem"])
    return Device(
        name=row["name"],
        identity=identity,
        enrolled=row["enrolled"],
        lines=lines,
        generation=row["generation"],
        sent_generation=row["sent_generation"],
        online=row["online"],
        reported=msgspec.json.decode(row["reported"], type=Reported) if row["reported"] else None,
        reported_at=row["reported_at"],
    )
