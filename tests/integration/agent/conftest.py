"""A real broker, a fleet that answers over it, and an agent as a process of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from agent_program import AgentProgram
from fake_fleet import FakeFleet, MqttResponder, free_port, mosquitto


@pytest.fixture
def broker(tmp_path) -> Iterator[int]:
    port = free_port()
    with mosquitto(tmp_path, port):
        yield port


@pytest.fixture
def fleet() -> FakeFleet:
    return FakeFleet()


@pytest.fixture
def responder(fleet, broker) -> Iterator[MqttResponder]:
    responder = MqttResponder(fleet, broker)
    yield responder
    responder.close()


@pytest.fixture
def program(tmp_path, broker, fleet) -> AgentProgram:
    return AgentProgram(tmp_path / "state", broker, fleet)
