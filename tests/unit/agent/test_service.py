"""What the service manager is told, and when it is told nothing."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from agent_program import wait_for
from kiridashi_agent import cage
from kiridashi_agent.broker import MqttSettings
from kiridashi_agent.cage import open_cage, take_over_own_group
from kiridashi_agent.mqtt import MqttTransport
from kiridashi_agent.process import Limits, run_child
from kiridashi_agent.service import ServiceManager, StopSignal

ABSTRACT = f"@kiridashi-test-{os.getpid()}"


@pytest.fixture(params=["file", "abstract"])
def inbox(request, tmp_path):
    """A service manager's socket, and the address that it is known by."""
    address = ABSTRACT if request.param == "abstract" else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(address.replace("@", "\0", 1))
        receiver.settimeout(2.0)
        yield receiver, address


def test_assignments_go_out_as_one_datagram(inbox) -> None:
    receiver, address = inbox
    ServiceManager(address).tell(READY="1", STATUS="two\nlines")
    assert receiver.recv(4096) == b"READY=1\nSTATUS=two lines"


def test_nobody_listening_is_logged_and_no_more(tmp_path, caplog) -> None:
    ServiceManager(str(tmp_path / "gone")).tell(READY="1")
    assert "could not be told" in caplog.text
    ServiceManager().tell(READY="1")


def test_the_manager_s_variables_are_taken_out() -> None:
    environment = {"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "7", "PATH": "/bin"}
    manager = ServiceManager.from_environment(environment, pid=7)
    assert (manager.listens, manager.watchdog_s, environment) == (True, 3.0, {"PATH": "/bin"})
    other = {"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "8"}
    assert ServiceManager.from_environment(other, pid=7).watchdog_s == 0.0
    assert not ServiceManager.from_environment({"WATCHDOG_USEC": "nonsense"}, pid=7).listens


class Told(ServiceManager):
    def __init__(self, watchdog_s: float) -> None:
        super().__init__("@nobody", watchdog_s)
        self.said: list[dict[str, str]] = []

    def tell(self, **assignments: str) -> None:
        self.said.append(assignments)


def test_asking_whether_to_stop_is_the_sign_of_life_three_times_in_the_waiting_time() -> None:
    now, manager = [0.0], Told(watchdog_s=60.0)
    stop = StopSignal(manager, lambda: True, lambda: f"at {now[0]:.0f}", lambda: now[0])
    for second in range(61):
        now[0] = second
        assert not stop.is_set()
    assert manager.said == [{"WATCHDOG": "1", "STATUS": f"at {n}"} for n in (0, 20, 40, 60)]
    stop.set()
    assert stop.is_set()


def test_without_the_connection_s_thread_there_is_no_sign_of_life() -> None:
    now, manager, well = [0.0], Told(watchdog_s=3.0), [True]
    stop = StopSignal(manager, lambda: well[0], lambda: "", lambda: now[0])
    stop.is_set()
    well[0] = False
    for now[0] in range(1, 100):
        stop.is_set()
    assert len(manager.said) == 1
    well[0] = True
    stop.is_set()
    assert len(manager.said) == 2


def test_a_long_job_is_no_hang() -> None:
    manager = Told(watchdog_s=0.3)
    stop = StopSignal(manager, lambda: True, lambda: "")
    sleep = ["-c", "import time; input(); time.sleep(1.0); print('done')"]
    reply, _ = run_child(sleep, lambda _: b"", Limits(30, cancel=stop), "sleeping")
    assert reply == b"done\n"
    assert len(manager.said) >= 5


def test_the_transport_is_alive_as_long_as_its_thread() -> None:
    transport = MqttTransport(MqttSettings("cam-1", "127.0.0.1", 1))
    assert not transport.is_alive()
    transport.start()
    wait_for(transport.is_alive, 5)
    transport.stop()
    assert not transport.is_alive()


def test_weeks_without_a_broker_fill_no_memory_with_events() -> None:
    transport = MqttTransport(MqttSettings("cam-1", "127.0.0.1", 1))
    for number in range(5000):
        transport.publish_event("active", {"number": number})
    assert len(transport._acks) <= 256


def delegated(root: Path, procs: str) -> tuple[Path, Path]:
    """A control group as systemd hands it over, in files; and what /proc says of this process."""
    own = root / "system.slice" / "kiridashi-agent.service"
    own.mkdir(parents=True)
    (own / "cgroup.controllers").write_text("cpu memory pids\n")
    (own / "cgroup.procs").write_text(procs)
    groups = root / "groups"
    groups.write_text("0::/system.slice/kiridashi-agent.service\n")
    return own, groups


def test_a_group_that_was_handed_over_makes_room_for_jobs(tmp_path, monkeypatch) -> None:
    uid = tmp_path.stat().st_uid or 1234
    own, groups = delegated(tmp_path, f"{os.getpid()}\n")
    os.chown(own, uid, -1)
    assert take_over_own_group(tmp_path, groups, uid)
    assert (own / "agent" / "cgroup.procs").read_text() == str(os.getpid())
    assert (own / "cgroup.subtree_control").read_text() == "+memory"
    groups.write_text("0::/system.slice/kiridashi-agent.service/agent\n")
    monkeypatch.setattr(cage, "_OWN_GROUPS", groups)
    (own / "cgroup.subtree_control").write_text("memory\n")  # as the kernel shows it
    job = open_cage(1 << 20, tmp_path)
    assert job.kind == "cgroup"
    (limit,) = own.glob("kiridashi-job-*/memory.max")
    assert limit.read_text() == str(1 << 20)


@pytest.mark.parametrize(("uid", "procs"), [(0, "me"), (4321, "me"), (1234, "me\n1")])
def test_a_group_of_others_is_left_alone(tmp_path, uid, procs) -> None:
    own, groups = delegated(tmp_path, procs.replace("me", str(os.getpid())))
    os.chown(own, 1234, -1)
    assert not take_over_own_group(tmp_path, groups, uid)
    assert not (own / "agent").exists()


def test_a_group_that_cannot_be_divided_leaves_resource_limits(tmp_path) -> None:
    own, groups = delegated(tmp_path, f"{os.getpid()}\n")
    os.chown(own, 1234, -1)
    (own / "cgroup.subtree_control").mkdir()  # the kernel would say "busy" here
    assert not take_over_own_group(tmp_path, groups, 1234)
    assert open_cage(1 << 20, tmp_path).kind == "rlimit"
