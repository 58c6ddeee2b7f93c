"""The rules of the responder: a device gets what its lines need, and nothing makes it fail."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kiridashi.errors import InputError
from kiridashi.messages import Request
from kiridashi_server.fleet.answers import Plant, Reply, answer, respond
from kiridashi_server.fleet.published import METADATA_NAME, PROBES_NAME, TARGET_NAME
from kiridashi_server.fleet.repository import MAX_FILE_BYTES
from kiridashi_server.fleet.store import MAX_CHUNK_INDEX

MINE, OTHERS, ABSENT, PROBES = "a" * 64, "b" * 64, "c" * 64, "d" * 64


class FakePlant:
    """Device ``cam-1`` serves ``press-3`` with blob MINE; ``weld-1`` and blob OTHERS are not its business.

    Device ``cam-3`` serves nothing, and is asked to measure PROBES. ``reports`` is what was handed over.
    """

    def __init__(self):
        self.read = []
        self.reports = []

    def read_metadata(self, name):
        assert METADATA_NAME.fullmatch(name)
        self.read.append(name)
        return None if name == "9.root.json" else b"metadata of " + name.encode()

    def read_target(self, path):
        assert TARGET_NAME.fullmatch(path) or PROBES_NAME.fullmatch(path)
        self.read.append(path)
        return None if path.endswith("/9.json") else b"manifest"

    def read_chunk(self, sha256, index):
        self.read.append((sha256, index))
        return b"piece" if sha256 in (MINE, OTHERS) and index < 3 else None

    def lines_of(self, device):
        return frozenset(["press-3"]) if device == "cam-1" else frozenset()

    def may_read(self, device, sha256):
        return device == "cam-1" and sha256 == MINE

    def probes_of(self, device):
        return PROBES if device == "cam-3" else None

    def take_report(self, device, number, data):
        if number != 4:
            raise InputError(f"device '{device}' was not asked for profile {number}")
        self.reports.append((device, data))


def views(plant):
    return Plant(files=plant, blobs=plant, authorisation=plant, reports=plant)


def ask(device="cam-1", **fields):
    plant = FakePlant()
    return answer(Request(**fields), device, views(plant)), plant.read


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"method": "metadata", "name": "timestamp.json"}, "ok"),
        ({"method": "metadata", "name": "4.line-press-3.json"}, "ok"),
        ({"method": "metadata", "name": "9.root.json"}, "not-found"),
        ({"method": "target", "name": "lines/press-3/1.json"}, "ok"),
        ({"method": "target", "name": f"lines/press-3/{MINE}.1.json"}, "ok"),
        ({"method": "target", "name": "lines/press-3/9.json"}, "not-found"),
        ({"method": "chunk", "sha256": MINE, "index": 2}, "ok"),
        ({"method": "chunk", "sha256": MINE, "index": 3}, "not-found"),
    ],
)
def test_what_a_device_gets_of_its_own_lines(fields, status):
    reply, _ = ask(**fields)
    assert reply.status == status


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "metadata", "name": "4.line-weld-1.json"},
        {"method": "metadata", "name": "../keys/root.pem"},
        {"method": "metadata", "name": ""},
        {"method": "target", "name": "lines/weld-1/1.json"},
        {"method": "target", "name": "lines/press-3/../weld-1/1.json"},
        {"method": "target", "name": "/etc/passwd"},
        {"method": "chunk", "sha256": OTHERS},
        {"method": "chunk", "sha256": ABSENT},
        {"method": "chunk", "sha256": MINE.upper()},
        {"method": "chunk", "sha256": MINE + "/"},
        {"method": "chunk", "sha256": MINE, "index": -1},
        {"method": "chunk", "sha256": MINE, "index": MAX_CHUNK_INDEX},
    ],
)
def test_what_is_refused_is_not_even_read(fields):
    reply, read = ask(**fields)
    assert reply.status == "refused"
    assert read == []


def test_an_unknown_device_reads_only_the_common_metadata():
    assert ask("cam-2", method="metadata", name="timestamp.json")[0].status == "ok"
    assert ask("cam-2", method="metadata", name="1.line-press-3.json")[0].status == "refused"
    assert ask("cam-2", method="target", name="lines/press-3/1.json")[0].status == "refused"
    assert ask("cam-2", method="chunk", sha256=MINE)[0].status == "refused"


@pytest.mark.parametrize("name", [f"probes/{PROBES}.json", f"probes/{MINE}.{PROBES}.json"])
def test_a_probe_set_is_for_those_who_are_to_measure_it(name):
    assert ask("cam-3", method="target", name=name)[0].status == "ok"
    assert ask("cam-3", method="metadata", name="2.probes.json")[0].status == "ok"
    for request in ({"method": "target", "name": name}, {"method": "metadata", "name": "2.probes.json"}):
        reply, read = ask("cam-1", **request)
        assert (reply.status, read) == ("refused", [])
    assert ask("cam-3", method="target", name=name.replace(PROBES, ABSENT))[0].status == "refused"


def test_a_report_is_acknowledged_or_refused_with_the_reason():
    plant, body = FakePlant(), msgspec.Raw(b'{"any": "thing"}')
    report = Request(method="report", index=4, body=body)
    assert answer(report, "cam-3", views(plant)) == Reply("ok", b"")
    assert plant.reports == [("cam-3", bytes(body))]
    reply = answer(Request(method="report", index=5, body=body), "cam-3", views(plant))
    assert reply == Reply("refused", b"device 'cam-3' was not asked for profile 5")


def test_a_foreign_and_an_absent_blob_look_the_same():
    assert ask(method="chunk", sha256=OTHERS)[0] == ask(method="chunk", sha256=ABSENT)[0]


def test_an_answer_that_does_not_fit_is_an_error():
    plant = FakePlant()
    plant.read_target = lambda path: b"x" * (MAX_FILE_BYTES + 1)
    reply = answer(Request(method="target", name="lines/press-3/1.json"), "cam-1", views(plant))
    assert reply == Reply("error", b"the answer does not fit into one message")


@given(st.binary(max_size=300))
def test_bytes_that_are_no_request_are_answered_in_words(payload):
    plant = FakePlant()
    reply = respond(payload, "cam-1", views(plant))
    assert reply.status == "error"
    assert 0 < len(reply.payload) <= 400
    assert plant.read == []


def test_a_request_of_another_protocol_version_is_an_error():
    plant = FakePlant()
    payload = msgspec.json.encode({"method": "metadata", "name": "timestamp.json", "protocol": "2.0"})
    reply = respond(payload, "cam-1", views(plant))
    assert (reply.status, plant.read) == ("error", [])


_name = st.one_of(
    st.text(max_size=60),
    st.from_regex(r"(lines/)?(press-3|weld-1|\.\.|[a-z./%-]{1,9})/?[0-9a-f.]{0,70}(\.json)?", fullmatch=True),
    st.from_regex(METADATA_NAME, fullmatch=True),
    st.from_regex(TARGET_NAME, fullmatch=True),
    st.from_regex(PROBES_NAME, fullmatch=True),
)


@given(
    method=st.sampled_from(["metadata", "target", "chunk"]),
    name=_name,
    sha256=st.one_of(st.sampled_from([MINE, OTHERS, ABSENT]), st.text(max_size=70)),
    index=st.integers(-(2**70), 2**70),
    device=st.sampled_from(["cam-1", "cam-2"]),
)
def test_no_request_reaches_beyond_the_devices_own_lines(method, name, sha256, index, device):
    plant = FakePlant()
    payload = msgspec.json.encode({"method": method, "name": name, "sha256": sha256, "index": index})
    reply = respond(payload, device, views(plant))
    if reply.status != "ok":
        return
    (read,) = plant.read
    if method == "chunk":
        assert device == "cam-1"
        assert read == (MINE, index)
    elif method == "target":
        assert device == "cam-1"
        assert read.startswith("lines/press-3/")
    else:
        assert "line-" not in read or read.endswith(".line-press-3.json")
