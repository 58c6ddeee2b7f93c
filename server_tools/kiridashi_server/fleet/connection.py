"""The server's MQTT 5 connection: a thin shell over paho that turns callbacks into a queue of happenings."""

from __future__ import annotations

import logging
import queue
import socket
import ssl
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
from kiridashi.errors import NetworkError
from kiridashi.manifest import CHUNK_BYTES
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

log = logging.getLogger(__name__)

SHARE = "$share/kiridashi/"
KEEPALIVE_S = 20
SESSION_EXPIRY_S = 300
# A publish is refused by the broker when topic, properties and payload together exceed its limit.
PACKET_OVERHEAD_BYTES = 1024
_MAX_WAITING = 4096


@dataclass(frozen=True)
class BrokerAddress:
    """Where the broker listens for TLS."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class ClientFiles:
    """PEM files of one side of mutual TLS."""

    authority: Path
    certificate: Path
    key: Path


@dataclass(frozen=True)
class Subscription:
    """A topic filter to listen on.

    Attributes:
        topics: the filter.
        shared: split the messages with other servers, where the broker has shared subscriptions.
        kept: stay subscribed after :meth:`Connection.close`, so that the broker keeps messages for the next start.
            A request must not wait for that: mosquitto gives a share of them also to a server that is away.
    """

    topics: str
    shared: bool = False
    kept: bool = True


@dataclass(frozen=True)
class ReplyHeader:
    """MQTT 5 properties of a reply: the asker's correlation data, one user property, and the message's life."""

    correlation: bytes
    user_property: tuple[str, str]
    expiry_s: int


@dataclass(frozen=True)
class Connected:
    """The broker accepted the connection, for the first time or again."""


@dataclass(frozen=True)
class Received:
    """A message arrived. ``correlation`` is its correlation data, ``None`` without."""

    topic: str
    payload: bytes
    correlation: bytes | None


@dataclass(frozen=True)
class Acknowledged:
    """The broker answered the publish ``mid``; ``refusal`` says why it refused, empty when it did not."""

    mid: int
    refusal: str


@dataclass(frozen=True)
class Stop:
    """Somebody asked the reader of the queue to end."""


Happening = Connected | Received | Acknowledged | Stop


class Connection:
    """One connection that paho's thread keeps up; what happens on it arrives in ``inbox``."""

    def __init__(
        self,
        address: BrokerAddress,
        files: ClientFiles,
        client_id: str,
        subscriptions: Sequence[Subscription] = (),
    ) -> None:
        # A SimpleQueue, because a signal handler may put into it while its reader waits.
        self.inbox: queue.SimpleQueue[Happening] = queue.SimpleQueue()
        self._address = address
        self._subscriptions = tuple(subscriptions)
        self._max_packet_bytes: int | None = None
        self._answered = threading.Event()
        self._refusal = ""
        self._share_prefix = SHARE
        self._share_mid: int | None = None
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=mqtt.MQTTv5)
        self._client.tls_set_context(_tls_context(files))
        self._client.reconnect_delay_set(min_delay=1, max_delay=15)
        self._client.connect_timeout = 5.0
        self._client.max_queued_messages_set(_MAX_WAITING)
        self._client.on_socket_open = _without_delay
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = self._on_disconnect
        self._client.on_subscribe = self._on_subscribe
        self._client.on_message = self._on_message
        self._client.on_publish = self._on_publish

    def open(self, timeout_s: float = 15.0) -> None:
        """Connect, and return once the broker has accepted.

        Raises:
            NetworkError: nobody listens, TLS or the broker refuses, no answer within ``timeout_s``, or the
                broker's packet limit is too small for a chunk.
        """
        properties = _properties(PacketTypes.CONNECT, SessionExpiryInterval=SESSION_EXPIRY_S)
        host, port = self._address.host, self._address.port
        try:
            self._client.connect(host, port, KEEPALIVE_S, clean_start=False, properties=properties)
        except (OSError, ValueError) as error:
            raise self._unreachable(str(error)) from error
        self._client.loop_start()
        if not self._answered.wait(timeout_s):
            self._refusal = f"no answer within {timeout_s:g} s"
        if self._refusal:
            self.close()
            raise self._unreachable(self._refusal)

    def close(self) -> None:
        """Disconnect and end paho's thread."""
        passing = [self._wire_filter(entry) for entry in self._subscriptions if not entry.kept]
        if passing and self.is_up:
            self._client.unsubscribe(passing)
        self._client.disconnect()
        self._client.loop_stop()

    @property
    def is_up(self) -> bool:
        """Whether the broker is connected now."""
        return self._client.is_connected()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, reply: ReplyHeader | None = None) -> int:
        """Hand a QoS 1 message to paho and return its id; an :class:`Acknowledged` follows.

        Raises:
            NetworkError: the message is over the broker's packet limit (it would be sent again for ever), the
                connection is down, or too many messages wait.
        """
        limit = self._max_packet_bytes
        if limit is not None and len(payload) + len(topic) + PACKET_OVERHEAD_BYTES > limit:
            raise NetworkError(
                f"a message of {len(payload)} bytes for '{topic}' was not sent",
                why=f"the broker at {self._address} accepts packets of at most {limit} bytes",
                next_step="raise max_packet_size in the broker's configuration",
            )
        if not self.is_up:
            raise NetworkError(f"a message for '{topic}' was not sent", why="the connection is down")
        properties = None
        if reply is not None:
            properties = _properties(
                PacketTypes.PUBLISH,
                CorrelationData=reply.correlation,
                UserProperty=reply.user_property,
                MessageExpiryInterval=reply.expiry_s,
            )
        info = self._client.publish(topic, payload, qos=1, retain=retain, properties=properties)
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            raise NetworkError(f"a message for '{topic}' was not sent", why=mqtt.error_string(info.rc))
        return info.mid

    def _unreachable(self, why: str) -> NetworkError:
        return NetworkError(
            f"the broker at {self._address} cannot be used",
            why=why,
            next_step="start the broker, or run 'kiridashi serve --with-broker'; 'kiridashi doctor' checks more",
        )

    # paho's callbacks: they run in its thread, so they only note and queue.

    def _on_connect(
        self, _client: mqtt.Client, _data: Any, _flags: Any, reason: ReasonCode, properties: Properties | None
    ) -> None:
        self._max_packet_bytes = getattr(properties, "MaximumPacketSize", None)
        if reason.is_failure:
            self._refusal = str(reason)
        elif self._max_packet_bytes and self._max_packet_bytes < CHUNK_BYTES + PACKET_OVERHEAD_BYTES:
            self._refusal = (
                f"it accepts packets of at most {self._max_packet_bytes} bytes, a chunk needs "
                f"{CHUNK_BYTES + PACKET_OVERHEAD_BYTES} (max_packet_size)"
            )
        else:
            self._share_prefix = SHARE if getattr(properties, "SharedSubscriptionAvailable", 1) else ""
            self._share_mid = self._subscribe(shared=True)
            self._subscribe(shared=False)
            self.inbox.put(Connected())
        if self._refusal and self._answered.is_set():
            log.error("the broker at %s cannot be used any more: %s", self._address, self._refusal)
        self._answered.set()

    def _subscribe(self, *, shared: bool) -> int | None:
        chosen = [self._wire_filter(entry) for entry in self._subscriptions if entry.shared == shared]
        if not chosen:
            return None
        return self._client.subscribe([(topics, SubscribeOptions(qos=1)) for topics in chosen])[1]

    def _wire_filter(self, entry: Subscription) -> str:
        return (self._share_prefix if entry.shared else "") + entry.topics

    def _on_subscribe(
        self, _client: mqtt.Client, _data: Any, mid: int, reasons: list[ReasonCode], _properties: Any
    ) -> None:
        refused = [str(reason) for reason in reasons if reason.is_failure]
        if refused and mid == self._share_mid and self._share_prefix:
            log.warning("the broker at %s has no shared subscriptions (%s)", self._address, refused[0])
            self._share_prefix = ""
            self._subscribe(shared=True)
        elif refused:
            log.error("the broker at %s refused a subscription: %s", self._address, ", ".join(refused))

    def _on_disconnect(
        self, _client: mqtt.Client, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any
    ) -> None:
        if not self._answered.is_set():
            self._refusal = f"it closed the connection ({reason}); is the certificate of this plant's authority?"
            self._answered.set()
        elif reason.is_failure:
            log.warning("the connection to the broker at %s was lost: %s", self._address, reason)

    def _on_message(self, _client: mqtt.Client, _data: Any, message: mqtt.MQTTMessage) -> None:
        if self.inbox.qsize() >= _MAX_WAITING:
            log.warning("a message on %s was dropped: %d are waiting", message.topic, _MAX_WAITING)
            return
        correlation = getattr(message.properties, "CorrelationData", None)
        self.inbox.put(Received(message.topic, bytes(message.payload), correlation))

    def _on_publish(self, _client: mqtt.Client, _data: Any, mid: int, reason: ReasonCode, _properties: Any) -> None:
        self.inbox.put(Acknowledged(mid, str(reason) if reason.is_failure else ""))


def _properties(packet: int, **values: Any) -> Properties:
    properties = Properties(packet)  # type: ignore[no-untyped-call]  # paho leaves this constructor untyped
    for name, value in values.items():
        setattr(properties, name, value)
    return properties


def _tls_context(files: ClientFiles) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=str(files.authority))
        context.load_cert_chain(files.certificate, files.key)
    except OSError as error:
        raise NetworkError(
            f"the TLS files {files.certificate} and {files.key} cannot be used", why=str(error)
        ) from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _without_delay(_client: mqtt.Client, _data: Any, sock: Any) -> None:
    # Nagle's algorithm and delayed acknowledgements together cost 40 ms for every chunk.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
