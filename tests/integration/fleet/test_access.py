"""Who may connect, and who may read and write which topic: checked by what is delivered, not by what is granted."""

from __future__ import annotations

import queue
import ssl
from dataclasses import replace
from uuid import uuid4

import pytest
from kiridashi_server.fleet.authority import Authority
from kiridashi_server.fleet.connection import Acknowledged, BrokerAddress, Connection, Subscription
from kiridashi_server.fleet.server import utc_now

OWN_WRITES = ("state", "online", "rpc", "evt/started")
OWN_READS = ("desired", "rx")


@pytest.fixture
def controller(plant, broker):
    """The server's own connection, without its responder."""
    connection = Connection(
        broker.address, plant.client_files, f"controller-{uuid4().hex}", [Subscription("kiri/v1/#")]
    )
    connection.open()
    yield connection
    connection.close()


def _topic(device, kind):
    return f"kiri/v1/d/{device}/{kind}"


def _retain_everywhere(controller, devices, text):
    """The server writes every topic of some devices, and returns when the broker has all."""
    topics = [_topic(device, kind) for device in devices for kind in (*OWN_WRITES, *OWN_READS)]
    waiting = {controller.publish(topic, text.format(topic).encode(), retain=True) for topic in topics}
    while waiting:
        happening = controller.inbox.get(timeout=5.0)
        if isinstance(happening, Acknowledged):
            waiting.discard(happening.mid)


def _received(controller, timeout_s=5.0):
    """The next message that reached the server."""
    while True:
        happening = controller.inbox.get(timeout=timeout_s)
        if getattr(happening, "payload", b""):
            return happening


def test_a_device_reads_its_own_topics_and_nobody_elses(enrol, controller):
    a = enrol("cam-a", "press-3").connect("kiri/v1/#")
    b = enrol("cam-b", "press-3").connect("kiri/v1/#")
    _retain_everywhere(controller, ("cam-a", "cam-b"), "{}")
    for client in (a, b):
        seen = {client.next().payload.decode() for _ in OWN_READS}
        assert seen == {_topic(client.name, kind) for kind in OWN_READS}
        with pytest.raises(queue.Empty):
            client.next(0.3)
    a.close()
    # Retained messages obey the same list.
    late = enrol("cam-c", "press-3").connect("kiri/v1/#", _topic("cam-a", "desired"), _topic("cam-b", "rx"))
    with pytest.raises(queue.Empty):
        late.next(0.3)
    _retain_everywhere(controller, ("cam-a", "cam-b"), "")


def test_a_device_writes_its_own_topics_and_nobody_elses(enrol, controller):
    a = enrol("cam-a", "press-3").connect()
    forbidden = [_topic("cam-b", kind) for kind in (*OWN_WRITES, *OWN_READS)]
    forbidden += [_topic("cam-a", kind) for kind in OWN_READS]
    forbidden += ["kiri/v1/blob/x", "kiri/v1/d/cam-a", "other", "kiri/v1/d/cam-a/evt", "kiri/v1/d/cam-a/evt/a/b"]
    for topic in forbidden:
        assert a.publish(topic, b"forged") == "Not authorized"
    for kind in OWN_WRITES:
        assert a.publish(_topic("cam-a", kind), kind.encode()) != "Not authorized"
    # In order and complete: nothing of the forbidden came before the four permitted ones.
    assert [_received(controller).payload.decode() for _ in OWN_WRITES] == list(OWN_WRITES)


def test_no_certificate_and_a_foreign_certificate_are_refused(enrol, broker, plant, tmp_path):
    device = enrol("cam-a", "press-3")
    nobody = replace(device, files=replace(device.files, certificate=tmp_path / "absent"))
    foreign = Authority.init(tmp_path / "ca", "elsewhere", utc_now())
    csr = (tmp_path / "cam-a" / "device.key").read_bytes()
    forged = tmp_path / "forged.pem"
    forged.write_bytes(_self_made(foreign, csr))
    impostor = replace(device, files=replace(device.files, certificate=forged))
    for stranger in (nobody, impostor):
        with pytest.raises((ConnectionRefusedError, ssl.SSLError)):
            stranger.connect()
    device.connect().close()  # and the right one is let in


def test_the_brokers_own_certificate_is_no_pass(plant, broker):
    """A certificate for serving does not open a client connection, nor may a device pose as the broker."""
    connection = Connection(broker.address, plant.broker_files, "thief")
    with pytest.raises(Exception, match="cannot be used"):
        connection.open(timeout_s=3.0)


def test_a_device_checks_the_brokers_name(enrol, broker):
    device = enrol("cam-a", "press-3")
    wrong = replace(device, address=BrokerAddress("127.0.0.2", broker.address.port))
    with pytest.raises((ssl.SSLCertVerificationError, ConnectionRefusedError)):
        wrong.connect()


def _self_made(authority, key_pem):
    """A certificate for the device's key and name from an authority that the plant does not know."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.x509.oid import NameOID

    key = serialization.load_pem_private_key(key_pem, None)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cam-a")])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    pem = csr.public_bytes(serialization.Encoding.PEM)
    return authority.sign_device(pem, "cam-a", utc_now()).public_bytes(serialization.Encoding.PEM)
