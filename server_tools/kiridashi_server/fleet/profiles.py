"""Profiles in the registry: probe sets, what devices were asked to measure, and what they reported."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from datetime import datetime

import msgspec
from kiridashi.errors import InputError
from kiridashi.messages import ProbesDesired, Reported, probes_path
from kiridashi.probes import ProbeReport
from sqlalchemy import ColumnElement, Connection, Engine, delete, exists, insert, select, update

from kiridashi_server.fleet.database import next_generation, note_event, stamp, transaction
from kiridashi_server.fleet.records import Profile, ProfileRequest, PublishedProbes
from kiridashi_server.fleet.tables import CANDIDATE, DEVICE, PROBE_BLOB, PROBE_SET, PROFILE, PROFILE_REQUEST

PROFILES_KEPT = 10
"""How many profiles of one device class, probe set's name, backbone, runtime and thread count are kept."""
_KEY = ("device_class", "probe_set", "backbone_fingerprint", "runtime", "threads")


def wanted_probes(db: Connection, device: str) -> ProbesDesired | None:
    """The request that a device has not answered yet."""
    row = db.execute(select(PROFILE_REQUEST).where(_is_open(device))).first()
    return ProbesDesired(probes_path(row.probes), row.number, row.seconds, row.threads) if row else None


def is_asked_to_read(db: Connection, device: str, sha256: str) -> bool:
    """Whether a file belongs to the probe set that a device is to measure."""
    join = (PROBE_BLOB.c.probes == PROFILE_REQUEST.c.probes) & (PROBE_BLOB.c.sha256 == sha256)
    return bool(db.execute(select(exists().where(join & _is_open(device)))).scalar())


class ProfileBook:
    """The profiles of one registry. Every method is one transaction."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._writer = engine.execution_options(writes=True)

    def add_probes(
        self, probes: PublishedProbes, blobs: Iterable[str], *, is_candidate: bool = False
    ) -> PublishedProbes:
        """Note a probe set and the digests of its files; one that is there is returned as it is.

        A candidate is a cut that a device is to judge: what is measured of it is nobody's profile.
        """
        with transaction(self._writer) as db:
            row = db.execute(select(PROBE_SET).where(PROBE_SET.c.digest == probes.digest)).mappings().first()
            if row:
                return PublishedProbes(**row)
            db.execute(insert(PROBE_SET).values(**asdict(probes)))
            for sha256 in sorted(set(blobs)):
                db.execute(insert(PROBE_BLOB).values(sha256=sha256, probes=probes.digest))
            if is_candidate:
                db.execute(insert(CANDIDATE).values(probes=probes.digest))
            return probes

    def probe_sets(self) -> tuple[PublishedProbes, ...]:
        """All probe sets but the candidates, the oldest first."""
        query = select(PROBE_SET).where(_is_no_candidate()).order_by(PROBE_SET.c.published, PROBE_SET.c.digest)
        with transaction(self._engine) as db:
            return tuple(PublishedProbes(**row) for row in db.execute(query).mappings())

    def ask(self, devices: Sequence[str], wanted: ProfileRequest, now: datetime) -> int:
        """Ask devices for a profile; returns how many were asked anew.

        A device that works on the same request already is left alone. ``wanted`` gives probe set, seconds and threads;
        each device gets a number of its own.

        Raises:
            InputError: an unknown device; nobody was asked.
        """
        with transaction(self._writer) as db:
            fresh = [request for name in devices if (request := _next_request(db, name, wanted)) is not None]
            for request in fresh:
                db.execute(delete(PROFILE_REQUEST).where(PROFILE_REQUEST.c.device == request.device))
                db.execute(insert(PROFILE_REQUEST).values(**asdict(request)))
                next_generation(db, request.device)
                note_event(db, request.device, "profile-wanted", probes_path(request.probes), now)
            return len(fresh)

    def requests(self) -> tuple[ProfileRequest, ...]:
        """What every device was asked last, by device."""
        with transaction(self._engine) as db:
            rows = db.execute(select(PROFILE_REQUEST).order_by(PROFILE_REQUEST.c.device)).mappings()
            return tuple(ProfileRequest(**row) for row in rows)

    def request_of(self, device: str) -> ProfileRequest | None:
        """What a device was asked last."""
        with transaction(self._engine) as db:
            row = db.execute(select(PROFILE_REQUEST).where(PROFILE_REQUEST.c.device == device)).mappings().first()
            return ProfileRequest(**row) if row else None

    def add(self, request: ProfileRequest, report: ProbeReport, runtime: str, fingerprint: str, now: datetime) -> None:
        """Keep a report as the answer to an open request; the device is then told that nothing more is wanted.

        A request that is answered, or is no longer the device's last, is left as it is.
        """
        here = _is_open(request.device) & (PROFILE_REQUEST.c.number == request.number)
        row = {
            "device": request.device,
            "request": request.number,
            "probes": request.probes,
            "device_class": report.device_class,
            "backbone_fingerprint": fingerprint,
            "runtime": runtime,
            "threads": report.threads,
            "complete": report.complete,
            "measured": stamp(now),
            "report": msgspec.json.encode(report, order="sorted").decode(),
        }
        with transaction(self._writer) as db:
            if not db.execute(update(PROFILE_REQUEST).where(here).values(answered=stamp(now))).rowcount:
                return
            db.execute(insert(PROFILE).values(**row))
            like = [PROFILE.c[name] == row[name] for name in _KEY if name != "probe_set"]
            own_name = select(PROBE_SET.c.name).where(PROBE_SET.c.digest == request.probes).scalar_subquery()
            joined = select(PROFILE.c.id).join(PROBE_SET, PROBE_SET.c.digest == PROFILE.c.probes)
            ids = joined.where(*like, PROBE_SET.c.name == own_name).order_by(
                PROFILE.c.complete.desc(), PROFILE.c.id.desc()
            )
            surplus = list(db.execute(ids.offset(PROFILES_KEPT)).scalars())
            db.execute(delete(PROFILE).where(PROFILE.c.id.in_(surplus)))
            next_generation(db, request.device)
            note_event(db, request.device, "profiled", f"{report.device_class}: {len(report.timings)} graphs", now)

    def profiles(self, device_class: str | None = None) -> tuple[Profile, ...]:
        """The newest complete one for every device class (or one), name of a probe set, backbone, runtime and threads.

        Where no complete one has come yet, the newest incomplete one. What was measured of candidates is none of them.
        """
        named = select(PROFILE, PROBE_SET.c.name.label("probe_set"))
        joined = named.join(PROBE_SET, PROBE_SET.c.digest == PROFILE.c.probes)
        query = joined.where(_is_no_candidate()).order_by(PROFILE.c.complete, PROFILE.c.id)
        if device_class is not None:
            query = query.where(PROFILE.c.device_class == device_class)
        with transaction(self._engine) as db:
            newest = {tuple(row[name] for name in _KEY): row for row in db.execute(query).mappings()}
        names = ("device", *_KEY, "measured")
        return tuple(
            Profile(**{name: row[name] for name in names}, report=msgspec.json.decode(row["report"], type=ProbeReport))
            for _, row in sorted(newest.items())
        )

    def class_of(self, device: str) -> str | None:
        """The device class that a device last reported, ``None`` before its first report."""
        query = select(PROFILE.c.device_class).where(PROFILE.c.device == device).order_by(PROFILE.c.id.desc())
        with transaction(self._engine) as db:
            return db.execute(query.limit(1)).scalar()

    def answers(self, device: str, probes: str, threads: int, since: datetime) -> tuple[ProbeReport, ...]:
        """The complete reports of one device on one probe set, as they came."""
        of_it = _is_report(device, probes) & (PROFILE.c.threads == threads) & PROFILE.c.complete
        query = select(PROFILE.c.report).where(of_it, PROFILE.c.measured >= stamp(since)).order_by(PROFILE.c.id)
        with transaction(self._engine) as db:
            return tuple(msgspec.json.decode(text, type=ProbeReport) for text in db.execute(query).scalars())

    def forget(self, device: str, probes: str) -> None:
        """Drop a device's reports on a candidate; those on other probe sets stay."""
        is_candidate = PROFILE.c.probes.in_(select(CANDIDATE.c.probes))
        with transaction(self._writer) as db:
            db.execute(delete(PROFILE).where(_is_report(device, probes), is_candidate))


def _is_report(device: str, probes: str) -> ColumnElement[bool]:
    return (PROFILE.c.device == device) & (PROFILE.c.probes == probes)


def _is_no_candidate() -> ColumnElement[bool]:
    return PROBE_SET.c.digest.not_in(select(CANDIDATE.c.probes))


def _is_open(device: str) -> ColumnElement[bool]:
    return (PROFILE_REQUEST.c.device == device) & PROFILE_REQUEST.c.answered.is_(None)


def _next_request(db: Connection, device: str, wanted: ProfileRequest) -> ProfileRequest | None:
    """The request that a device gets; ``None`` when it works on the same one."""
    known = db.execute(select(DEVICE.c.reported).where(DEVICE.c.name == device)).first()
    if known is None:
        raise InputError(f"there is no device '{device}'", next_step="kiridashi fleet list")
    reported = msgspec.json.decode(known.reported, type=Reported).probes if known.reported else None
    row = db.execute(select(PROFILE_REQUEST).where(PROFILE_REQUEST.c.device == device)).mappings().first()
    before = ProfileRequest(**row) if row else None
    if before is not None and before.answered is None:
        ended = reported is not None and reported.request == before.number and reported.phase in ("sent", "failed")
        if not ended and before == replace(wanted, device=device, number=before.number, asked=before.asked):
            return None
    # Beyond what the device has seen, also when this database was restored from an older backup.
    number = 1 + max(before.number if before else 0, reported.request if reported else 0)
    return replace(wanted, device=device, number=number)
