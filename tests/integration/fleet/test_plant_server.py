"""The plant server over its folder: enrolment, publishing, wanting, and interruptions between its steps."""

from __future__ import annotations

import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from kiridashi.errors import BundleError, InputError, StateError
from kiridashi.messages import Desired, LineDesired, LineState, Reported
from kiridashi_server.fleet.connection import BrokerAddress
from kiridashi_server.fleet.database import EVENTS_KEPT
from kiridashi_server.fleet.server import PlantServer, utc_now


@pytest.fixture
def server(tmp_path):
    server = PlantServer.init(tmp_path / "state", BrokerAddress("127.0.0.1", 8883), plant="Kobe 2")
    for line in ("press-3", "weld-1"):
        server.add_line(line)
    yield server
    server.close()


def test_a_ticket_holds_what_the_device_needs(server, device_request):
    ticket = server.enrol(device_request("cam-1"), ["press-3"])
    certificate = x509.load_pem_x509_certificate(ticket.certificate_pem.encode())
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ticket.ca_pem.encode()))
    assert json.loads(ticket.tuf_root)["signed"]["_type"] == "root"
    assert (ticket.broker_host, ticket.broker_port, ticket.lines) == ("127.0.0.1", 8883, ("press-3",))
    device = server.registry.device("cam-1")
    assert device.identity.certificate_serial == f"{certificate.serial_number:x}"
    assert device.lines == {"press-3": None}


def test_a_taken_name_needs_replace_and_the_same_request_does_not(server, device_request):
    first, second = device_request("cam-1"), device_request("cam-1")
    server.enrol(first, ["press-3"])
    server.enrol(first, ["press-3"])
    with pytest.raises(InputError, match="enrolled already") as caught:
        server.enrol(second, ["press-3"])
    assert "--replace" in caught.value.next_step
    assert server.registry.device("cam-1").identity.seal_public_key_pem == first.seal_public_key_pem
    server.enrol(second, ["weld-1"], replace=True)
    device = server.registry.device("cam-1")
    assert device.identity.seal_public_key_pem == second.seal_public_key_pem
    assert device.lines == {"weld-1": None}


@pytest.mark.parametrize("damage", ["line", "seal", "seal kind", "name"])
def test_a_bad_request_enrols_nobody(server, device_request, damage):
    request, lines = device_request("cam-1"), ["press-3"]
    if damage == "line":
        lines = ["paint-9"]
    elif damage == "seal":
        request = msgspec.structs.replace(request, seal_public_key_pem="none")
    elif damage == "seal kind":
        key = server.authority.key.public_key()
        pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        request = msgspec.structs.replace(request, seal_public_key_pem=pem.decode())
    else:
        request = msgspec.structs.replace(request, device="cam-2")
    with pytest.raises(InputError):
        server.enrol(request, lines)
    assert server.registry.devices() == ()


def test_publishing_checks_everything_first(server, make_bundle, tmp_path):
    bundle = make_bundle("press-3", 1)
    with pytest.raises(InputError, match="for line 'press-3', not for 'weld-1'"):
        server.publish(bundle, "weld-1")
    pretty = make_bundle("press-3", 1)
    manifest = pretty / "manifest.json"
    manifest.write_bytes(msgspec.json.format(manifest.read_bytes(), indent=2))
    with pytest.raises(BundleError, match="not in canonical form"):
        server.publish(pretty, "press-3")
    changed = make_bundle("press-3", 1)
    data = bytearray((changed / "model.onnx").read_bytes())
    data[1000] ^= 1
    (changed / "model.onnx").write_bytes(data)
    with pytest.raises(BundleError, match="not the file that the manifest lists"):
        server.publish(changed, "press-3")
    assert list((server.folder / "store").rglob("*")) == []
    assert server.registry.releases() == ()
    server.publish(make_bundle("press-3", 2), "press-3")
    with pytest.raises(InputError, match="older than what is published"):
        server.publish(bundle, "press-3")
    with pytest.raises(InputError, match="published with other content"):
        server.publish(make_bundle("press-3", 2, size=5000), "press-3")
    assert [release.version for release in server.registry.releases("press-3")] == [2]


@pytest.mark.parametrize("step", ["store.add", "repository.publish_target", "registry.add_release"])
def test_publishing_again_completes_an_interrupted_publish(server, make_bundle, monkeypatch, step):
    bundle = make_bundle("press-3", 1)
    part, name = step.split(".")

    def cut(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(getattr(server, part), name, cut)
    with pytest.raises(KeyboardInterrupt):
        server.publish(bundle, "press-3")
    monkeypatch.undo()
    assert server.registry.releases() == ()
    release = server.publish(bundle, "press-3")
    assert server.registry.releases() == (release,)
    assert server.publish(bundle, "press-3") == release


def test_wanting_a_version_counts_generations_only_where_something_changes(server, device_request, make_bundle):
    for device in ("cam-1", "cam-2"):
        server.enrol(device_request(device), ["press-3"])
    with pytest.raises(InputError, match="nothing is published"):
        server.set_desired("press-3")
    server.publish(make_bundle("press-3", 1), "press-3")
    server.publish(make_bundle("press-3", 2), "press-3")
    assert server.set_desired("press-3", version=1) == 2
    assert server.set_desired("press-3", version=1) == 0
    assert server.set_desired("press-3", devices=["cam-2"]) == 1
    assert server.registry.desired("cam-1") == Desired(2, {"press-3": LineDesired("lines/press-3/1.json")})
    assert server.registry.desired("cam-2") == Desired(3, {"press-3": LineDesired("lines/press-3/2.json")})
    for refused in (
        {"version": 3},
        {"version": 1, "devices": ["cam-9"]},
        {"version": 1, "devices": ["cam-1", "cam-9"]},
    ):
        with pytest.raises(InputError):
            server.set_desired("press-3", **refused)
    assert server.registry.desired("cam-1").generation == 2


def test_a_device_that_comes_later_gets_what_the_line_was_offered(server, device_request, make_bundle):
    server.publish(make_bundle("press-3", 1), "press-3")
    server.set_desired("press-3")
    server.publish(make_bundle("press-3", 2), "press-3")  # held back
    server.enrol(device_request("cam-1"), ["press-3"])
    assert server.registry.desired("cam-1").lines == {"press-3": LineDesired("lines/press-3/1.json")}
    server.assign("cam-1", ["weld-1"])
    assert server.registry.desired("cam-1") == Desired(2, {})
    with pytest.raises(InputError, match="no device 'cam-9'"):
        server.assign("cam-9", ["weld-1"])


def test_acknowledged_generations_only_grow(server, device_request):
    server.enrol(device_request("cam-1"), ["press-3"])
    server.assign("cam-1", ["weld-1"])
    assert server.registry.unsent() == ("cam-1",)
    server.registry.mark_sent("cam-1", 2)
    server.registry.mark_sent("cam-1", 1)
    assert server.registry.unsent() == ()


def test_a_registry_from_an_old_backup_catches_up_with_its_devices(server, device_request):
    server.enrol(device_request("cam-1"), ["press-3"])
    server.registry.record_report(Reported("cam-1", 40, {"press-3": LineState("active")}, "0.1.0"), utc_now())
    assert server.registry.desired("cam-1").generation == 41
    server.registry.record_report(Reported("cam-1", 2**63, {}, "0.1.0"), utc_now())
    assert server.registry.desired("cam-1").generation == 41
    assert server.registry.record_report(Reported("ghost", 1, {}, "0.1.0"), utc_now()) is False


def test_history_is_bounded(server, device_request, monkeypatch):
    monkeypatch.setattr("kiridashi_server.fleet.database.EVENTS_KEPT", 10)
    assert EVENTS_KEPT >= 100
    server.enrol(device_request("cam-1"), ["press-3"])
    for number in range(25):
        server.registry.record_event("cam-1", "tick", str(number), utc_now())
    events = server.registry.events("cam-1", 1000)
    assert [event.payload for event in events] == [str(number) for number in range(24, 14, -1)]
    assert server.registry.record_event("ghost", "tick", "", utc_now()) is False


def test_two_processes_may_write_at_once(server, device_request):
    """A second opening of the folder, as the command line does while the server serves."""
    server.enrol(device_request("cam-1"), ["press-3"])
    other = PlantServer.open(server.folder)

    def toggle(which):
        for _ in range(10):
            which.assign("cam-1", ["weld-1"])
            which.assign("cam-1", ["press-3"])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(toggle, [server, other]))
    generation = server.registry.device("cam-1").generation
    assert 20 < generation <= 41
    other.close()


def test_init_again_keeps_everything_and_moves_the_broker(server, device_request):
    server.enrol(device_request("cam-1"), ["press-3"])
    root, ca = server.repository.published.root_bytes(), server.authority.certificate_pem
    certificate = server.broker_files.certificate.read_bytes()
    same = PlantServer.init(server.folder)
    assert same.settings == server.settings
    assert server.broker_files.certificate.read_bytes() == certificate
    moved = PlantServer.init(server.folder, BrokerAddress("broker.plant.example", 9883), hosts=["10.0.0.9"])
    assert (moved.repository.published.root_bytes(), moved.authority.certificate_pem) == (root, ca)
    assert moved.registry.device("cam-1") is not None
    assert moved.settings.instance == server.settings.instance
    assert server.broker_files.certificate.read_bytes() != certificate
    assert "listener 9883" in (server.folder / "mosquitto" / "mosquitto.conf").read_text()
    for opened in (same, moved):
        opened.close()


def test_a_folder_that_is_no_plant_server_is_named(tmp_path, server):
    with pytest.raises(StateError, match="no plant server in"):
        PlantServer.open(tmp_path / "nothing")
    with pytest.raises(InputError, match="not a TCP port"):
        PlantServer.init(tmp_path / "new", BrokerAddress("127.0.0.1", 70000))
    (server.folder / "server.json").write_text("{}")
    with pytest.raises(StateError, match="cannot be read"):
        PlantServer.open(server.folder)


def test_a_damaged_registry_is_a_typed_error(server, tmp_path):
    server.close()
    (server.folder / "registry.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(StateError, match="cannot be opened"):
        PlantServer.open(server.folder)
    with pytest.raises(InputError, match="database URL"):
        PlantServer.init(tmp_path / "other", BrokerAddress("127.0.0.1", 8883), database="no-such-driver://x")


def test_the_registry_survives_power_cuts_by_its_settings(server):
    with sqlite3.connect(server.folder / "registry.sqlite") as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
