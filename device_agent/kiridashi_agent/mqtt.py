"""The transport over MQTT 5 (paho-mqtt): one connection, one network thread.

Correct without a durable session at the broker, with duplicates and with answers in any order. Sources: OASIS
MQTT
5.0, sections 3.1.2.11 (session expiry, receive maximum, maximum packet size), 3.1.3.2.2 (will delay), 4.10
(request and response).
"""

from __future__ import annotations

import json
import logging
import secrets
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

import paho.mqtt.client as paho
from kiridashi.errors import InputError, NetworkError
from kiridashi.messages import (
    MAX_MESSAGE_BYTES,
    STATUS_PROPERTY,
    Desired,
    Reported,
    Request,
    decode,
    device_topic,
    encode,
    event_topic,
)
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from kiridashi_agent.broker import MqttSettings, diagnose
from kiridashi_agent.logs import RateLimited
from kiridashi_agent.transport import NotFoundError, RefusedError, exchange

_LOG = logging.getLogger(__name__)
_NO_SUBSCRIBERS = 0x10
_FIRST_FAILURE = 0x80
_HEADER_BYTES = 4096
_QUEUE_LIMIT = 256
ONLINE, OFFLINE = b"online", b"offline"


class MqttTransport:
    """A :class:`~kiridashi_agent.transport.Transport`. Use :meth:`start` once, and :meth:`stop` at the
    end."""

    def __init__(self, settings: MqttSettings) -> None:
        self._settings = settings
        self._context = settings.tls.context() if settings.tls else None
        self._connected = threading.Event()
        self._replies: dict[bytes, Future[bytes]] = {}
        self._acks: dict[int, Future[ReasonCode]] = {}
        self._max_packet: int | None = None
        self._state_lock = threading.RLock()
        self._state: bytes | None = None
        self._state_ack: Future[ReasonCode] | None = None
        self._desired: Desired | None = None
        self._desired_changed = threading.Condition()
        self._last_failure = ""
        self._network: threading.Thread | None = None
        self._quiet = RateLimited(_LOG, every_s=60.0)
        self._client = self._build()

    def start(self) -> None:
        """Connect in the background, and again after every loss, for as long as the process lives."""
        properties = _properties(
            PacketTypes.CONNECT,
            SessionExpiryInterval=self._settings.session_expiry_s,
            ReceiveMaximum=2 * self._settings.window,
            MaximumPacketSize=MAX_MESSAGE_BYTES + _HEADER_BYTES,
        )
        self._client.connect_async(
            self._settings.host,
            self._settings.port,
            keepalive=self._settings.keepalive_s,
            clean_start=False,
            properties=properties,
        )
        self._client.loop_start()

    def is_alive(self) -> bool:
        """Whether the network thread runs, connected or not: without it nothing would ever be heard again."""
        return self._network is not None and self._network.is_alive()

    def wait_connected(self, timeout_s: float) -> None:
        """Return once there is a connection.

        Raises:
            NetworkError: none within the time; says which address and, as far as can be found out, why.
        """
        if not self._connected.wait(timeout_s):
            raise self._unreachable(self._last_failure or diagnose(self._settings))

    def stop(self) -> None:
        """Say goodbye (the retained ``online`` becomes ``offline``) and close the connection."""
        if self._connected.is_set():
            ack = self._publish(device_topic(self._settings.device, "online"), OFFLINE, retain=True)
            try:
                ack.result(timeout=2.0)
            except (FutureTimeoutError, NetworkError) as error:
                _LOG.debug("the goodbye was not acknowledged: %s", error)
        self._client.disconnect()
        self._client.loop_stop()

    def request_many(self, requests: Iterable[Request]) -> Iterator[tuple[Request, bytes]]:
        """See :meth:`kiridashi_agent.transport.Requests.request_many`."""
        settings = self._settings
        return exchange(self._submit, requests, window=settings.window, timeout_s=settings.request_timeout_s)

    def publish_state(self, reported: Reported) -> None:
        """See :meth:`kiridashi_agent.transport.Transport.publish_state`.

        Raises:
            NetworkError: the message is larger than the broker takes.
        """
        with self._state_lock:
            self._state = encode(reported)
            self._state_ack = None
            if self._connected.is_set():
                self._send_state(self._state)

    def flush(self, timeout_s: float) -> None:
        """Return once the broker has the latest state.

        Raises:
            NetworkError: it was refused, or not acknowledged within the time.
        """
        self.wait_connected(timeout_s)
        with self._state_lock:
            ack = self._state_ack
        if ack is None:
            return
        try:
            reason = ack.result(timeout=timeout_s)
        except FutureTimeoutError as error:
            raise self._unreachable(f"the state was not acknowledged within {timeout_s:g} s") from error
        if reason.value >= _FIRST_FAILURE:
            raise RefusedError(f"the broker refused the state: {reason}", next_step="check the broker's access list")

    def publish_event(self, name: str, body: Mapping[str, Any]) -> None:
        """See :meth:`kiridashi_agent.transport.Transport.publish_event`.

        Raises:
            NetworkError: the message is larger than the broker takes.
        """
        data = json.dumps(body, sort_keys=True).encode()
        ack = self._publish(event_topic(self._settings.device, name), data)
        ack.add_done_callback(lambda done: _log_failure(f"event '{name}'", done))

    def next_desired(self, timeout_s: float) -> Desired | None:
        """See :meth:`kiridashi_agent.transport.Transport.next_desired`."""
        with self._desired_changed:
            self._desired_changed.wait_for(lambda: self._desired is not None, timeout_s)
            desired, self._desired = self._desired, None
            return desired

    def _build(self) -> paho.Client:
        client = paho.Client(CallbackAPIVersion.VERSION2, client_id=self._settings.device, protocol=paho.MQTTv5)
        if self._context is not None:
            client.tls_set_context(self._context)
        will = _properties(PacketTypes.WILLMESSAGE, WillDelayInterval=self._settings.will_delay_s)
        client.will_set(device_topic(self._settings.device, "online"), OFFLINE, qos=1, retain=True, properties=will)
        client.max_queued_messages_set(_QUEUE_LIMIT)
        client.reconnect_delay_set(min_delay=1, max_delay=60)
        client.on_pre_connect = self._on_pre_connect
        client.on_socket_open = _no_delay
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        return client

    def _submit(self, request: Request) -> Future[bytes]:
        self.wait_connected(self._settings.request_timeout_s)
        key = secrets.token_bytes(16)
        expiry_s = max(1, int(self._settings.request_timeout_s))
        properties = _properties(PacketTypes.PUBLISH, CorrelationData=key, MessageExpiryInterval=expiry_s)
        reply: Future[bytes] = Future()
        self._replies[key] = reply
        reply.add_done_callback(lambda _: self._replies.pop(key, None))
        try:
            ack = self._publish(device_topic(self._settings.device, "rpc"), encode(request), properties)
        except NetworkError:
            reply.cancel()
            raise
        ack.add_done_callback(lambda done: _fail_if_refused(done, reply))
        return reply

    def _publish(
        self, topic: str, data: bytes, properties: Properties | None = None, *, retain: bool = False
    ) -> Future[ReasonCode]:
        limit = self._max_packet
        if limit is not None and len(data) + len(topic) + _HEADER_BYTES > limit:
            raise NetworkError(
                f"a message of {len(data)} bytes for {topic} was not sent",
                why=f"the broker takes at most {limit} bytes, headers included",
                next_step="raise max_packet_size at the broker",
            )
        info = self._client.publish(topic, data, qos=1, retain=retain, properties=properties)
        # The acknowledgement may have come in already: whoever is first makes the future (setdefault is atomic).
        ack = self._acks.setdefault(info.mid, Future())
        ack.add_done_callback(lambda _: self._acks.pop(info.mid, None))
        if info.rc == paho.MQTT_ERR_QUEUE_SIZE:
            _settle(ack, error=NetworkError(f"too many messages wait; one for {topic} was dropped"))
        return ack

    def _send_state(self, data: bytes) -> None:
        ack = self._publish(device_topic(self._settings.device, "state"), data, retain=True)
        ack.add_done_callback(lambda done: _log_failure("state", done))
        self._state_ack = ack

    def _on_pre_connect(self, _client: paho.Client, _data: Any) -> None:
        self._network = threading.current_thread()  # called in paho's own thread before every attempt

    def _on_connect(
        self, client: paho.Client, _data: Any, _flags: Any, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if reason.is_failure:
            self._last_failure = f"the broker refused the connection: {reason}"
            self._quiet.warning(
                "the broker %s:%s refused the connection: %s",
                self._settings.host,
                self._settings.port,
                reason,
            )
            return
        self._last_failure = ""
        self._max_packet = getattr(properties, "MaximumPacketSize", None)
        device = self._settings.device
        client.subscribe([(device_topic(device, kind), SubscribeOptions(qos=1)) for kind in ("desired", "rx")])
        self._publish(device_topic(device, "online"), ONLINE, retain=True)
        with self._state_lock:
            self._connected.set()
            if self._state is not None:
                self._send_state(self._state)
        _LOG.info("connected to the broker %s:%s", self._settings.host, self._settings.port)

    def _on_connect_fail(self, _client: paho.Client, _data: Any) -> None:
        self._quiet.warning(
            "the broker %s:%s cannot be reached; trying again", self._settings.host, self._settings.port
        )

    def _on_disconnect(
        self, _client: paho.Client, _data: Any, _flags: Any, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        self._connected.clear()
        if reason.is_failure:
            self._quiet.warning("the connection to the broker ended: %s", reason)
        for reply in list(self._replies.values()):
            _settle(reply, error=self._unreachable("the connection ended"))

    def _on_publish(
        self, _client: paho.Client, _data: Any, mid: int, reason: ReasonCode, _properties: Properties
    ) -> None:
        _settle(self._acks.setdefault(mid, Future()), value=reason)

    def _on_message(self, _client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        if message.topic == device_topic(self._settings.device, "rx"):
            self._take_reply(message)
        elif message.topic == device_topic(self._settings.device, "desired") and message.payload:
            try:
                desired = decode(bytes(message.payload), Desired)
            except InputError as error:
                _LOG.error("the desired state was ignored: %s", error)
                return
            with self._desired_changed:
                self._desired = desired
                self._desired_changed.notify_all()

    def _take_reply(self, message: paho.MQTTMessage) -> None:
        reply = self._replies.get(getattr(message.properties, "CorrelationData", b""))
        if reply is None:
            return  # late, doubled, or of an earlier process: nobody waits for it any more
        status = dict(getattr(message.properties, "UserProperty", [])).get(STATUS_PROPERTY, "")
        if status == "ok":
            _settle(reply, value=bytes(message.payload))
            return
        text = message.payload[:500].decode(errors="replace")
        kinds: dict[str, type[NetworkError]] = {"not-found": NotFoundError, "refused": RefusedError}
        _settle(reply, error=kinds.get(status, NetworkError)(f"the server answered '{status}'", why=text))

    def _unreachable(self, why: str) -> NetworkError:
        address = f"{self._settings.host}:{self._settings.port}"
        return NetworkError(
            f"the broker {address} cannot be used",
            why=why,
            next_step=f"check that the broker runs, that {address} is right, and run kiridashi-agent doctor",
        )


def _properties(packet: int, **values: object) -> Properties:
    properties = Properties(packet)  # type: ignore[no-untyped-call]
    for name, value in values.items():
        setattr(properties, name, value)
    return properties


def _no_delay(_client: paho.Client, _data: Any, sock: Any) -> None:
    # Without this, Nagle's algorithm and delayed acknowledgements cost 40 ms per chunk.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _settle(future: Future[Any], *, value: Any = None, error: NetworkError | None = None) -> None:
    try:
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)
    except InvalidStateError:
        _LOG.debug("an answer came after its deadline")


def _fail_if_refused(ack: Future[ReasonCode], reply: Future[bytes]) -> None:
    if ack.cancelled():
        return
    problem = ack.exception()
    if isinstance(problem, NetworkError):
        _settle(reply, error=problem)
        return
    reason = ack.result()
    if reason.value == _NO_SUBSCRIBERS:
        text = "nobody at the broker listens for requests"
        step = "start the fleet server: kiridashi serve"
        _settle(reply, error=NetworkError("no server answers", why=text, next_step=step))
    elif reason.value >= _FIRST_FAILURE:
        _settle(reply, error=RefusedError(f"the broker refused a request: {reason}"))


def _log_failure(what: str, ack: Future[ReasonCode]) -> None:
    problem = ack.exception()
    if problem is not None:
        _LOG.warning("the %s message was not sent: %s", what, problem)
    elif ack.result().value >= _FIRST_FAILURE:
        _LOG.error("the broker refused the %s message: %s", what, ack.result())
