"""The MQTT transport against a real mosquitto."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from agent_program import wait_for
from fake_fleet import MqttResponder, free_port, mosquitto
from kiridashi.errors import NetworkError
from kiridashi.messages import Desired, LineDesired, LineState, Reported, Request
from kiridashi_agent.broker import MqttSettings, diagnose
from kiridashi_agent.mqtt import MqttTransport
from kiridashi_agent.transport import NotFoundError, RefusedError, request_one

REPORT = Reported("cam-1", 3, {"press-3": LineState("idle")}, "0.1.0")
DESIRED = Desired(4, {"press-3": LineDesired("lines/press-3/1.json")})
BLOB = "ab" * 32


def settings(port: int, **changes) -> MqttSettings:
    return replace(MqttSettings("cam-1", "127.0.0.1", port, request_timeout_s=3.0), **changes)


@pytest.fixture
def transport(broker):
    transport = MqttTransport(settings(broker))
    transport.start()
    transport.wait_connected(10)
    yield transport
    transport.stop()


def test_answers_belong_to_their_requests(transport, responder, fleet) -> None:
    fleet.blobs[BLOB] = [b"%d" % n * 1000 for n in range(50)]
    requests = [Request("chunk", sha256=BLOB, index=n) for n in range(50)]
    answers = {request.index: data for request, data in transport.request_many(requests)}
    assert answers == dict(enumerate(fleet.blobs[BLOB]))


def test_a_whole_chunk_fits(transport, responder, fleet) -> None:
    fleet.blobs[BLOB] = [bytes(256 * 1024)]
    assert len(request_one(transport, Request("chunk", sha256=BLOB))) == 256 * 1024


def test_round_trips_are_not_held_up_by_the_network_stack(transport, responder, fleet) -> None:
    fleet.blobs[BLOB] = [bytes(64 * 1024)] * 40
    request_one(transport, Request("chunk", sha256=BLOB))
    started = time.perf_counter()
    for n in range(40):
        request_one(transport, Request("chunk", sha256=BLOB, index=n))
    assert time.perf_counter() - started < 40 * 0.040  # what Nagle and delayed ACK would cost


def test_not_found_is_an_answer(transport, responder) -> None:
    with pytest.raises(NotFoundError, match="there is no such thing"):
        request_one(transport, Request("metadata", name="2.root.json"))


def test_nobody_listening_is_said_at_once(transport) -> None:
    started = time.monotonic()
    with pytest.raises(NetworkError, match="no server answers"):
        request_one(transport, Request("metadata", name="timestamp.json"))
    assert time.monotonic() - started < 3.0


def test_doubled_and_foreign_answers_are_ignored(transport, responder, fleet) -> None:
    fleet.blobs[BLOB] = [b"right"]
    original = responder.publish

    def publish(topic, data, **properties):
        properties.pop("retain", None)
        original(topic, b"wrong", **{**properties, "CorrelationData": b"0123456789abcdef"})
        original(topic, data, **properties)
        original(topic, b"late", **properties)

    responder.publish = publish
    for _ in range(3):
        assert request_one(transport, Request("chunk", sha256=BLOB)) == b"right"


def test_desired_comes_retained_and_only_once(transport, responder) -> None:
    responder.want("cam-1", DESIRED)
    assert transport.next_desired(5) == DESIRED
    assert transport.next_desired(0.1) is None


def test_what_is_no_desired_state_is_ignored(transport, responder) -> None:
    responder.publish("kiri/v1/d/cam-1/desired", b"{")
    responder.publish("kiri/v1/d/cam-1/desired", b'{"generation":1,"lines":{},"protocol":"2.0"}')
    responder.publish("kiri/v1/d/cam-1/desired", b"")
    responder.want("cam-1", DESIRED)
    assert transport.next_desired(5) == DESIRED


def test_state_and_events_arrive(transport, responder) -> None:
    transport.publish_state(REPORT)
    transport.flush(5)
    transport.publish_event("activated", {"line": "press-3"})
    wait_for(lambda: ("kiri/v1/d/cam-1/evt/activated", b'{"line": "press-3"}') in responder.seen)
    assert responder.states == [REPORT]


def test_the_latest_state_is_sent_again_when_the_broker_comes_back(tmp_path, fleet) -> None:
    port = free_port()
    transport = MqttTransport(settings(port))
    transport.publish_state(replace_generation(1))
    transport.start()
    with mosquitto(tmp_path, port):
        transport.wait_connected(10)
        transport.flush(5)
    wait_for(lambda: not transport._connected.is_set())
    transport.publish_state(replace_generation(2))
    with mosquitto(tmp_path, port):
        responder = MqttResponder(fleet, port)
        wait_for(lambda: responder.states and responder.states[-1].generation == 2)
        fleet.blobs[BLOB] = [b"x"]
        assert request_one(transport, Request("chunk", sha256=BLOB)) == b"x"
        responder.close()
        transport.stop()


def replace_generation(generation: int) -> Reported:
    return Reported("cam-1", generation, {}, "0.1.0")


def test_online_follows_the_connection(broker, responder) -> None:
    responder._client.subscribe("kiri/v1/d/+/online", qos=1)
    transport = MqttTransport(settings(broker, will_delay_s=0))
    transport.start()
    transport.wait_connected(10)
    wait_for(lambda: ("kiri/v1/d/cam-1/online", b"online") in responder.seen)
    transport.stop()
    wait_for(lambda: ("kiri/v1/d/cam-1/online", b"offline") in responder.seen)


def test_an_absent_broker_is_named_with_the_reason(tmp_path) -> None:
    port = free_port()
    transport = MqttTransport(settings(port, request_timeout_s=0.2))
    transport.start()
    with pytest.raises(NetworkError) as caught:
        transport.wait_connected(0.5)
    with pytest.raises(NetworkError):
        request_one(transport, Request("metadata", name="timestamp.json"))
    transport.stop()
    assert f"127.0.0.1:{port}" in caught.value.what
    assert "Connection refused" in caught.value.why
    assert "doctor" in caught.value.next_step


def test_a_message_above_the_broker_s_limit_is_not_sent(tmp_path) -> None:
    port = free_port()
    with mosquitto(tmp_path, port, "allow_anonymous true\nmax_packet_size 20000\n"):
        transport = MqttTransport(settings(port))
        transport.start()
        transport.wait_connected(10)
        with pytest.raises(NetworkError, match="the broker takes at most 20000 bytes"):
            transport.publish_event("big", {"text": "x" * 20000})
        transport.publish_state(REPORT)
        transport.flush(5)
        transport.stop()


def test_a_request_that_the_broker_forbids_is_refused_by_its_acknowledgement(tmp_path) -> None:
    (tmp_path / "acl").write_text("topic read kiri/v1/#\n")
    port = free_port()
    with mosquitto(tmp_path, port, f"allow_anonymous true\nacl_file {tmp_path / 'acl'}\n"):
        transport = MqttTransport(settings(port))
        transport.start()
        transport.wait_connected(10)
        with pytest.raises(RefusedError, match="Not authorized"):
            request_one(transport, Request("metadata", name="timestamp.json"))
        transport.publish_state(REPORT)
        with pytest.raises(NetworkError, match="refused the state"):
            transport.flush(5)
        transport.stop()


def test_a_broker_that_refuses_us_says_why(tmp_path) -> None:
    port = free_port()
    with mosquitto(tmp_path, port, "allow_anonymous false\n"):
        transport = MqttTransport(settings(port))
        transport.start()
        with pytest.raises(NetworkError, match="Not authorized"):
            transport.wait_connected(1.0)
        transport.stop()


def test_the_diagnosis_is_empty_when_the_broker_answers(broker) -> None:
    assert diagnose(settings(broker)) == ""
