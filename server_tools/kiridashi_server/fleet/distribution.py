"""The distribution loop: it answers devices, notes what they report, and tells them what is wanted.

All work is done by the one thread that calls :meth:`Distribution.run`; the connection only queues. Every step
is idempotent, so several servers may run on one registry, and messages may come twice or be lost.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from threading import Thread

from kiridashi.errors import InputError, KiridashiError, NetworkError
from kiridashi.messages import (
    EVENT_FILTER,
    MAX_CONTROL_BYTES,
    ONLINE_FILTER,
    RPC_FILTER,
    STATE_FILTER,
    STATUS_PROPERTY,
    Reported,
    decode,
    device_of,
    device_topic,
    encode,
)

from kiridashi_server.fleet.answers import Plant, Reply, respond
from kiridashi_server.fleet.connection import (
    Acknowledged,
    BrokerAddress,
    ClientFiles,
    Connected,
    Connection,
    Happening,
    Received,
    ReplyHeader,
    Stop,
    Subscription,
)
from kiridashi_server.fleet.profiling import ReportDesk
from kiridashi_server.fleet.registry import Registry
from kiridashi_server.fleet.repository import Repository
from kiridashi_server.fleet.store import BlobStore

log = logging.getLogger(__name__)

POLL_S = 0.5
RENEW_S = 60.0
RESEND_S = 10.0
MAX_UNACKNOWLEDGED = 64
REPLY_EXPIRY_S = 60
MAX_CORRELATION_BYTES = 256
ONLINE = b"online"
_SUBSCRIPTIONS = (
    Subscription(RPC_FILTER, shared=True, kept=False),
    Subscription(EVENT_FILTER, shared=True),
    Subscription(STATE_FILTER),  # retained messages do not come through shared subscriptions
    Subscription(ONLINE_FILTER),
)


class Distribution:
    """Answers, notes and tells, for one plant server."""

    def __init__(
        self,
        registry: Registry,
        repository: Repository,
        store: BlobStore,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._registry = registry
        self._repository = repository
        self._plant = Plant(repository.published, store, registry, ReportDesk(registry, repository.published, now))
        self._now = now
        self._connection: Connection | None = None
        self._backlog: dict[str, None] = {}  # devices to tell, in order
        self._sent: dict[int, tuple[str, int]] = {}  # message id -> device and generation, until acknowledged
        self._refused_until: dict[str, float] = {}

    def connect(self, address: BrokerAddress, files: ClientFiles, client_id: str) -> None:
        """Connect to the broker; :meth:`run` does the work.

        Raises:
            NetworkError: see :meth:`Connection.open`.
        """
        connection = Connection(address, files, client_id, _SUBSCRIPTIONS)
        connection.open()
        self._connection = connection

    def run(self) -> None:
        """Work until :meth:`stop`.

        Raises:
            NetworkError: :meth:`connect` was not called.
        """
        connection = self._open_connection()
        poll_at = renew_at = time.monotonic()
        while True:
            try:
                happening = connection.inbox.get(timeout=max(0.0, poll_at - time.monotonic()))
            except queue.Empty:
                pass
            else:
                if isinstance(happening, Stop):
                    return
                self._guarded(self._handle, happening)
            if time.monotonic() >= poll_at:
                self._guarded(self._find_changed)
                poll_at = time.monotonic() + POLL_S
            if time.monotonic() >= renew_at:
                self._guarded(self._renew)
                renew_at = time.monotonic() + RENEW_S
            while self._backlog and connection.is_up and len(self._sent) < MAX_UNACKNOWLEDGED:
                self._guarded(self._tell_next)

    def stop(self) -> None:
        """Let :meth:`run` end; may be called from any thread or signal handler."""
        self._open_connection().inbox.put(Stop())

    def close(self) -> None:
        """Disconnect from the broker."""
        if self._connection is not None:
            self._connection.close()

    @contextmanager
    def running(self) -> Iterator[Thread]:
        """:meth:`run` in a thread for the time of a ``with`` block; a defect of the thread is raised at its end."""
        failures: list[BaseException] = []

        def body() -> None:
            try:
                self.run()
            except BaseException as error:  # noqa: BLE001 - handed over to the thread that leaves the block
                failures.append(error)

        thread = Thread(target=body, name="kiridashi-distribution", daemon=True)
        thread.start()
        try:
            yield thread
        finally:
            self.stop()
            thread.join()
        if failures:
            raise failures[0]

    def _open_connection(self) -> Connection:
        if self._connection is None:
            raise NetworkError("the distribution is not connected to a broker", next_step="call connect() first")
        return self._connection

    def _guarded(self, step: Callable[..., None], *arguments: Happening) -> None:
        """Run one step; what goes wrong with one message or one device must not end the service for the others."""
        try:
            step(*arguments)
        except (KiridashiError, OSError) as error:
            log.warning("%s", error.diagnostics() if isinstance(error, KiridashiError) else error)

    def _handle(self, happening: Happening) -> None:
        match happening:
            case Connected():
                # A broker may have forgotten what was retained: every device is told again.
                self._sent.clear()
                self._backlog.update((device.name, None) for device in self._registry.devices())
            case Acknowledged():
                self._acknowledge(happening)
            case Received():
                self._receive(happening)
            case Stop():
                pass

    def _receive(self, message: Received) -> None:
        device, kind = device_of(message.topic), message.topic.split("/")[4]
        if kind == "rpc":
            self._answer(device, message)
        elif kind == "state":
            self._note_state(device, message.payload)
        elif kind == "online":
            self._registry.record_online(device, online=message.payload == ONLINE)
        elif kind == "evt":
            event = message.topic.rpartition("/")[2]
            text = message.payload[:MAX_CONTROL_BYTES].decode(errors="replace")
            self._registry.record_event(device, event, text, self._now())

    def _answer(self, device: str, message: Received) -> None:
        correlation = message.correlation
        if not correlation or len(correlation) > MAX_CORRELATION_BYTES:
            log.warning("a request of device '%s' has no usable correlation data", device)
            return
        try:
            reply = respond(message.payload, device, self._plant)
        except (KiridashiError, OSError):
            log.exception("a request of device '%s' failed", device)
            reply = Reply("error", b"the server cannot answer now; its log says why")
        header = ReplyHeader(correlation, (STATUS_PROPERTY, reply.status), REPLY_EXPIRY_S)
        self._open_connection().publish(device_topic(device, "rx"), reply.payload, reply=header)

    def _note_state(self, device: str, payload: bytes) -> None:
        report = decode(payload, Reported)
        if report.device != device:
            raise InputError(f"device '{device}' reported as '{report.device}'", why="a device speaks for itself only")
        if not self._registry.record_report(report, self._now()):
            log.warning("device '%s' is not enrolled here; its report was not kept", device)

    def _find_changed(self) -> None:
        waiting = {device for device, _ in self._sent.values()}
        now = time.monotonic()
        for device in self._registry.unsent():
            if device not in waiting and now >= self._refused_until.get(device, 0.0):
                self._backlog[device] = None

    def _tell_next(self) -> None:
        device = next(iter(self._backlog))
        del self._backlog[device]
        desired = self._registry.desired(device)
        if desired is not None:
            topic = device_topic(device, "desired")
            mid = self._open_connection().publish(topic, encode(desired), retain=True)
            self._sent[mid] = (device, desired.generation)

    def _acknowledge(self, answer: Acknowledged) -> None:
        sent = self._sent.pop(answer.mid, None)
        if answer.refusal:
            what = f"the desired state of '{sent[0]}'" if sent else "a reply"
            log.error("the broker refused %s: %s", what, answer.refusal)
        if sent:
            device, generation = sent
            if answer.refusal:
                self._refused_until[device] = time.monotonic() + RESEND_S
            else:
                self._registry.mark_sent(device, generation)

    def _renew(self) -> None:
        renewed = self._repository.refresh_timestamp(self._now())
        if renewed:
            log.info("renewed the signatures of %s", ", ".join(renewed))
