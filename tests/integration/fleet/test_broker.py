"""Starting and stopping brokers, and what happens without one."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import threading
import time

import paho.mqtt.client as mqtt
import pytest
from kiridashi.errors import MissingExtraError, NetworkError
from kiridashi.messages import Request, device_topic
from kiridashi_server.fleet import broker as module
from kiridashi_server.fleet.broker import free_port
from kiridashi_server.fleet.connection import BrokerAddress, Connection, Subscription
from kiridashi_server.fleet.server import PlantServer
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode


@pytest.fixture
def own_plant(tmp_path):
    server = PlantServer.init(tmp_path / "state", BrokerAddress("127.0.0.1", free_port()))
    server.add_line("press-3")
    yield server
    server.close()


def test_a_broker_stops_and_starts_again_and_keeps_what_was_retained(own_plant):
    topic = device_topic("cam-1", "desired")
    with own_plant.start_broker() as broker:
        assert broker.kind == "mosquitto"
        assert "access list" in broker.description
        connection = Connection(broker.address, own_plant.client_files, "one")
        connection.open()
        connection.publish(topic, b"kept", retain=True)
        while type(connection.inbox.get(timeout=5)).__name__ != "Acknowledged":
            pass
        connection.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", broker.address.port), timeout=1)
    with own_plant.start_broker() as broker:
        connection = Connection(broker.address, own_plant.client_files, "two", [Subscription(topic)])
        connection.open()
        happenings = [connection.inbox.get(timeout=5) for _ in range(2)]
        assert [h.payload for h in happenings if hasattr(h, "payload")] == [b"kept"]
        connection.close()


def test_a_broker_that_a_killed_process_left_is_replaced(own_plant):
    left = own_plant.start_broker()
    again = own_plant.start_broker()
    assert left._process.wait(5) is not None
    assert again.pid != left.pid
    again.check_alive()
    again.stop()


def test_the_pid_file_of_something_else_is_left_alone(own_plant):
    bystander = subprocess.Popen(["sleep", "30"])
    folder = own_plant.folder / "broker"
    folder.mkdir()
    (folder / "broker.pid").write_text(str(bystander.pid))
    with own_plant.start_broker():
        assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_a_broker_that_dies_says_why(own_plant):
    with own_plant.start_broker() as broker:
        os.kill(broker.pid, signal.SIGKILL)
        broker._process.wait(5)
        with pytest.raises(NetworkError, match="ended with code -9"):
            broker.check_alive()


def test_a_taken_port_is_named_with_the_brokers_own_words(own_plant):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", own_plant.settings.broker_port))
        taken.listen()
        with pytest.raises(NetworkError, match="in use"):
            own_plant.start_broker()


def test_an_absent_broker_is_an_error_within_a_bounded_time(own_plant):
    started = time.monotonic()
    with (
        pytest.raises(NetworkError, match=f"127.0.0.1:{own_plant.settings.broker_port}") as caught,
        own_plant.serving(),
    ):
        pass
    assert time.monotonic() - started < 5
    assert "kiridashi serve --with-broker" in caught.value.next_step


def test_a_port_that_accepts_and_says_nothing_is_an_error_within_a_bounded_time(own_plant):
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", own_plant.settings.broker_port))
        mute.listen()
        with pytest.raises(NetworkError, match="cannot be used"), own_plant.serving():
            pass


def test_an_oversize_publish_is_refused_here_and_does_not_loop(own_plant):
    """Sent, the broker would close the connection, and the client would connect and send it again for ever."""
    with own_plant.start_broker() as broker:
        connection = Connection(broker.address, own_plant.client_files, "big")
        connection.open()
        with pytest.raises(NetworkError, match="accepts packets of at most 524288 bytes"):
            connection.publish(device_topic("cam-1", "rx"), b"x" * 524_288)
        connection.publish(device_topic("cam-1", "rx"), b"x" * 520_000)
        kinds = [type(connection.inbox.get(timeout=5)).__name__ for _ in range(2)]
        assert kinds == ["Connected", "Acknowledged"]  # one connection only, and it still works
        connection.close()


def test_a_broker_with_a_packet_limit_under_a_chunk_is_refused(own_plant, monkeypatch):
    monkeypatch.setattr("kiridashi_server.fleet.mosquitto.MAX_PACKET_BYTES", 65536)
    with (
        own_plant.start_broker(),
        pytest.raises(NetworkError, match="max_packet_size"),
        own_plant.serving(),
    ):
        pass


def test_the_server_comes_back_by_itself_and_tells_every_device_again(own_plant, enrol_at):
    """Also when the broker has lost what was retained."""
    device = enrol_at(own_plant, "cam-1", "press-3")
    broker = own_plant.start_broker()
    with own_plant.serving() as thread:
        device.connect(device_topic("cam-1", "desired"))
        first = device.next().payload
        device.close()
        broker.stop()
        (own_plant.folder / "broker" / "data" / "mosquitto.db").unlink()
        with own_plant.start_broker():
            device.connect(device_topic("cam-1", "desired"))
            assert device.next().payload == first
            assert thread.is_alive()


def test_without_mosquitto_the_wheels_broker_serves_and_says_what_it_lacks(own_plant, enrol_at, monkeypatch):
    monkeypatch.setattr(module, "_mosquitto_program", lambda: None)
    with own_plant.start_broker() as broker:
        assert broker.kind == "iotcore"
        assert "does NOT check device certificates, has NO access list" in broker.description
        with own_plant.serving():
            device = enrol_at(own_plant, "cam-1", "press-3").connect(device_topic("cam-1", "rx"))
            assert device.reply(Request("metadata", name="timestamp.json"))[0] == "ok"
            assert device.reply(Request("target", name="lines/weld-1/1.json"))[0] == "refused"


def test_the_description_of_iotcore_is_true(own_plant, tmp_path):
    """It lets a client in that has no certificate: if that ever changes, the description may too."""
    with own_plant.start_broker(kind="iotcore") as broker:
        files = own_plant.client_files
        context = ssl.create_default_context(cafile=str(files.authority))
        client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="nobody", protocol=mqtt.MQTTv5)
        client.tls_set_context(context)
        accepted = threading.Event()
        client.on_connect = lambda _c, _u, _f, reason, _p: None if reason.is_failure else accepted.set()
        client.connect(broker.address.host, broker.address.port)
        client.loop_start()
        assert accepted.wait(5)
        client.disconnect()
        client.loop_stop()


def test_a_machine_without_any_broker_is_told_what_to_install(own_plant, monkeypatch):
    monkeypatch.setattr(module, "_mosquitto_program", lambda: None)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="no broker") as caught:
        own_plant.start_broker()
    assert "apt install mosquitto" in caught.value.next_step


def test_where_shared_subscriptions_are_refused_the_server_subscribes_plainly(own_plant, monkeypatch):
    asked = []
    entries = [Subscription("kiri/v1/d/+/rpc", shared=True, kept=False), Subscription("kiri/v1/d/+/state")]
    connection = Connection(BrokerAddress("127.0.0.1", 1), own_plant.client_files, "server", entries)
    monkeypatch.setattr(connection._client, "subscribe", lambda pairs: (0, asked.append(pairs[0][0]) or len(asked)))
    success = ReasonCode(PacketTypes.CONNACK, "Success")
    refused = ReasonCode(PacketTypes.SUBACK, "Shared subscription not supported")
    connection._on_connect(None, None, None, success, None)
    connection._on_subscribe(None, None, 1, [refused], None)
    connection._on_subscribe(None, None, 3, [refused], None)  # and a second refusal does not loop
    assert asked == ["$share/kiridashi/kiri/v1/d/+/rpc", "kiri/v1/d/+/state", "kiri/v1/d/+/rpc"]
