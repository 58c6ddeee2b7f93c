"""The whole server side against a real broker: requests, desired states, reports, and the way through restarts."""

from __future__ import annotations

import hashlib
import queue
import socket
import time
from collections.abc import Callable

import pytest
from kiridashi.artifacts import read_bundle
from kiridashi.errors import StateError
from kiridashi.messages import Desired, LineState, Reported, Request, decode, device_topic, encode, event_topic
from kiridashi_server.fleet.connection import Connection
from kiridashi_server.fleet.server import PlantServer

WINDOW = 4


@pytest.fixture
def serving(plant, broker):
    with plant.serving():
        yield plant


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(0.02)


def download(device, sha256, chunks):
    """Every chunk by index with a window of four outstanding requests."""
    pieces, asked = {}, 0
    while len(pieces) < chunks:
        while asked < chunks and asked - len(pieces) < WINDOW:
            device.ask(Request("chunk", sha256=sha256, index=asked), asked.to_bytes(4, "big"))
            asked += 1
        message = device.next()
        assert dict(message.properties.UserProperty)["status"] == "ok"
        pieces[int.from_bytes(message.properties.CorrelationData, "big")] = message.payload
    return b"".join(pieces[index] for index in range(chunks))


def test_a_release_goes_from_bundle_to_device(serving, enrol, next_bundle):
    bundle = next_bundle("press-3")
    release = serving.publish(bundle, "press-3")
    device = enrol("cam-1", "press-3").connect(device_topic("cam-1", "desired"), device_topic("cam-1", "rx"))
    first = decode(device.next().payload, Desired)
    assert first.lines == {}  # nothing is offered yet
    assert serving.set_desired("press-3") == 1
    desired = decode(device.next().payload, Desired)
    assert desired.lines["press-3"].target == release.target
    assert desired.generation == first.generation + 1

    status, timestamp = device.reply(Request("metadata", name="timestamp.json"))
    assert (status, b'"timestamp"' in timestamp) == ("ok", True)
    status, manifest = device.reply(Request("target", name=release.target))
    assert manifest == (bundle / "manifest.json").read_bytes()
    artifact = read_bundle(bundle).artifacts[0]
    data = download(device, artifact.sha256, len(artifact.chunks))
    assert hashlib.sha256(data).hexdigest() == artifact.sha256
    assert device.reply(Request("chunk", sha256=artifact.sha256, index=len(artifact.chunks)))[0] == "not-found"
    assert device.reply(Request("metadata", name="77.root.json"))[0] == "not-found"


def test_a_device_of_another_line_reads_nothing_of_it(serving, enrol, next_bundle):
    bundle = next_bundle("weld-1")
    other = serving.publish(bundle, "weld-1")
    device = enrol("cam-2", "press-3").connect(device_topic("cam-2", "rx"))
    line_metadata = f"{serving.repository.published.committed().lines['weld-1'].signed.version}.line-weld-1.json"
    blob = read_bundle(bundle).artifacts[0]
    assert device.reply(Request("target", name=other.target))[0] == "refused"
    assert device.reply(Request("chunk", sha256=blob.sha256))[0] == "refused"
    assert device.reply(Request("metadata", name=line_metadata))[0] == "refused"
    serving.assign("cam-2", ["weld-1"])
    assert device.reply(Request("chunk", sha256=blob.sha256))[0] == "ok"
    assert device.reply(Request("metadata", name=line_metadata))[0] == "ok"
    serving.assign("cam-2", ["press-3"])
    assert device.reply(Request("chunk", sha256=blob.sha256))[0] == "refused"


def test_reports_and_events_are_kept(serving, enrol):
    device = enrol("cam-3", "press-3").connect(device_topic("cam-3", "desired"))
    device.next()
    report = Reported("cam-3", 1, {"press-3": LineState("active", version=1)}, "0.1.0")
    device.publish(device_topic("cam-3", "state"), encode(report), retain=True)
    device.publish(device_topic("cam-3", "online"), b"online", retain=True)
    device.publish(event_topic("cam-3", "activated"), b'{"line": "press-3"}')
    until(lambda: serving.registry.events("cam-3", 1)[0].kind == "activated")
    kept = serving.registry.device("cam-3")
    assert kept.reported == report
    assert kept.online is True
    assert serving.registry.events("cam-3", 1)[0].payload == '{"line": "press-3"}'


def test_nonsense_neither_stops_the_server_nor_is_kept(serving, enrol):
    device = enrol("cam-4", "press-3").connect(device_topic("cam-4", "rx"))
    stranger = encode(Reported("cam-3", 99, {}, "0.1.0"))
    for payload in (b"", b"\xff\x00", b"[]", b"x" * 70_000, stranger):
        device.publish(device_topic("cam-4", "state"), payload)
        device.publish(event_topic("cam-4", "strange"), payload)
        device.send(device_topic("cam-4", "rpc"), payload, correlation=b"only-one")
        reply = device.next()
        assert dict(reply.properties.UserProperty)["status"] == "error"
    device.publish(device_topic("cam-4", "rpc"), encode(Request("metadata", name="timestamp.json")))
    device.send(
        device_topic("cam-4", "rpc"), encode(Request("metadata", name="timestamp.json")), correlation=b"x" * 300
    )
    with pytest.raises(queue.Empty):
        device.next(0.3)  # without usable correlation data there is nobody to answer
    assert device.reply(Request("metadata", name="timestamp.json"))[0] == "ok"
    assert serving.registry.device("cam-4").reported is None
    assert serving.registry.device("cam-3") is None or serving.registry.device("cam-3").generation < 99


def test_a_change_made_while_nobody_serves_is_told_later(plant, broker, enrol, next_bundle):
    release = plant.publish(next_bundle("weld-1"), "weld-1")
    device = enrol("cam-5", "weld-1").connect(device_topic("cam-5", "desired"))
    with plant.serving():
        before = decode(device.next().payload, Desired)
    assert plant.set_desired("weld-1") >= 1
    with pytest.raises(queue.Empty):
        device.next(0.2)
    with plant.serving():
        seen = [decode(device.next().payload, Desired)]
        assert seen[-1].lines["weld-1"].target == release.target
        assert seen[-1].generation > before.generation
        until(lambda: plant.registry.unsent() == ())


def test_only_one_process_serves_a_folder(serving):
    second = PlantServer.open(serving.folder)
    with pytest.raises(StateError, match="another process serves"), second.serving():
        pass
    second.close()


def test_two_servers_with_folders_of_their_own_share_the_requests(serving, broker, enrol, tmp_path):
    """The second server joins the shared subscription: every request still gets exactly one answer."""
    from kiridashi_server.fleet.distribution import Distribution

    twin = Distribution(serving.registry, serving.repository, serving.store)
    twin.connect(serving.broker_address, serving.client_files, "kiridashi-server-twin")
    device = enrol("cam-6", "press-3").connect(device_topic("cam-6", "rx"))
    with twin.running():
        for number in range(20):
            device.ask(Request("metadata", name="timestamp.json"), number.to_bytes(2, "big"))
        answers = [device.next().properties.CorrelationData for _ in range(20)]
        with pytest.raises(queue.Empty):
            device.next(0.3)
    twin.close()
    assert sorted(answers) == [number.to_bytes(2, "big") for number in range(20)]


def test_chunks_come_whole_over_mutual_tls_and_their_rate_is_reported(serving, enrol, next_bundle, record_property):
    """The rate is a figure of the machine, so it is recorded and not judged."""
    bundle = next_bundle("press-3", size=24 * 1024 * 1024)
    serving.publish(bundle, "press-3")
    artifact = read_bundle(bundle).artifacts[0]
    device = enrol("cam-7", "press-3").connect(device_topic("cam-7", "rx"))
    started = time.perf_counter()
    data = download(device, artifact.sha256, len(artifact.chunks))
    rate = len(data) / (time.perf_counter() - started) / 1e6
    record_property("megabytes_per_second", round(rate, 1))
    print(f"{rate:.1f} MB/s")
    assert hashlib.sha256(data).hexdigest() == artifact.sha256


def test_neither_end_lets_small_packets_wait(plant, broker):
    """The setting itself is checked, at both ends. Its effect (40 ms for some chunks or for all) is too uneven, and
    a loaded machine too slow, for a bound on the time to tell them apart."""
    connection = Connection(broker.address, plant.client_files, "nodelay")
    connection.open()
    try:
        assert connection._client.socket().getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
    finally:
        connection.close()
    assert "\nset_tcp_nodelay true\n" in (plant.folder / "broker" / "mosquitto.conf").read_text()
    assert "\nset_tcp_nodelay true\n" in (plant.folder / "mosquitto" / "mosquitto.conf").read_text()
