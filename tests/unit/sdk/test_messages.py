"""The wire protocol: topics, names, limits, versions."""

import msgspec
import protocol_1_0 as old
import pytest
from fake_profile import make_probes
from hypothesis import given
from hypothesis import strategies as st
from kiridashi.errors import InputError, KiridashiError
from kiridashi.messages import (
    MAX_CONTROL_BYTES,
    PROTOCOL,
    Desired,
    LineDesired,
    LineState,
    ProbesDesired,
    ProbesState,
    Reported,
    Request,
    check_name,
    decode,
    device_of,
    device_topic,
    digest_in,
    encode,
    event_topic,
    probes_path,
    target_path,
)
from kiridashi.probes import (
    MAX_BYTES,
    MAX_GRAPHS,
    MAX_SECONDS,
    MAX_THREADS,
    ProbeReport,
    Timing,
    check_limits,
    decode_probe_report,
)

PROBES = ProbesDesired(probes_path("a" * 64), 3, 600.0, 2)
PROBES_STATE = ProbesState(PROBES.target, 3, "measuring", 4, 60)


def test_topics_carry_the_device_and_give_it_back() -> None:
    assert device_topic("cell-7", "desired") == "kiri/v1/d/cell-7/desired"
    assert event_topic("cell-7", "active") == "kiri/v1/d/cell-7/evt/active"
    assert device_of("kiri/v1/d/cell-7/evt/active") == "cell-7"
    assert target_path("press-3", 12) == "lines/press-3/12.json"


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a/b", "a+", "#", "a" * 64, "a b", "ä", "..", "a\n"])
def test_unsafe_names_are_refused_everywhere(name: str) -> None:
    for call in (lambda: check_name(name, "line"), lambda: device_topic(name, "rx"), lambda: target_path(name, 1)):
        with pytest.raises(InputError):
            call()


@pytest.mark.parametrize("topic", ["kiri/v1/d", "kiri/v2/d/a/rpc", "kiri/v1/x/a/rpc", "kiri/v1/d/A/rpc", ""])
def test_other_topics_have_no_device(topic: str) -> None:
    with pytest.raises(InputError):
        device_of(topic)


@given(st.integers(0, 2**31), st.dictionaries(st.from_regex(r"\A[a-z0-9]{1,8}\Z"), st.text(max_size=20), max_size=4))
def test_messages_survive_the_wire(generation: int, lines: dict[str, str]) -> None:
    desired = Desired(generation, {line: LineDesired(target) for line, target in lines.items()})
    assert decode(encode(desired), Desired) == desired


@given(st.binary(max_size=300))
def test_no_bytes_do_more_than_be_refused(data: bytes) -> None:
    for kind in (Desired, Reported, Request):
        try:
            decode(data, kind)
        except KiridashiError as error:
            assert isinstance(error, InputError)  # noqa: PT017


def test_a_string_that_is_no_utf_8_is_refused() -> None:
    data = encode(Desired(1, {})).replace(b"1.", b"\xff.")
    with pytest.raises(InputError, match="cannot be read"):
        decode(data, Desired)


def test_a_newer_minor_version_is_read_and_another_major_is_not() -> None:
    newer = b'{"generation":1,"lines":{},"protocol":"1.7","something":"new"}'
    assert decode(newer, Desired).generation == 1
    with pytest.raises(InputError, match=r"protocol 2\.0"):
        decode(newer.replace(b"1.7", b"2.0"), Desired)


def test_a_message_over_the_limit_is_not_parsed() -> None:
    with pytest.raises(InputError, match="64 KiB"):
        decode(b" " * (MAX_CONTROL_BYTES + 1), Request)


def test_a_device_of_1_0_reads_what_is_wanted_and_overlooks_the_profile() -> None:
    wanted = Desired(7, {"press-3": LineDesired("lines/press-3/2.json")}, probes=PROBES)
    seen = old.decode(encode(wanted), old.Desired)
    assert (seen.generation, seen.lines["press-3"].target) == (7, "lines/press-3/2.json")
    for request in (Request("chunk", sha256="b" * 64, index=3), Request("metadata", "timestamp.json")):
        sent = old.Request(request.method, request.name, request.sha256, request.index)
        assert decode(msgspec.json.encode(sent), Request) == msgspec.structs.replace(request, protocol="1.0")


def test_a_server_of_1_0_reads_the_report_and_refuses_the_method_it_does_not_know() -> None:
    said = Reported("cam-1", 7, {"press-3": LineState("active")}, "0.1.0", probes=PROBES_STATE)
    assert old.decode(encode(said), old.Reported).lines["press-3"].phase == "active"
    chunk = Request("chunk", sha256="b" * 64, index=3)
    assert old.decode(encode(chunk), old.Request) == old.Request("chunk", "", "b" * 64, 3, PROTOCOL)
    with pytest.raises(msgspec.ValidationError):
        old.decode(encode(Request("report", index=3)), old.Request)


def test_what_1_0_says_asks_for_no_profile() -> None:
    wanted = old.Desired(7, {"press-3": old.LineDesired("lines/press-3/2.json")})
    assert decode(msgspec.json.encode(wanted), Desired).probes is None
    said = old.Reported("cam-1", 7, {"press-3": old.LineState("active")}, "0.1.0")
    assert decode(msgspec.json.encode(said), Reported).probes is None


def test_the_profile_survives_the_wire() -> None:
    wanted = Desired(1, {}, probes=PROBES)
    assert decode(encode(wanted), Desired) == wanted
    said = Reported("cam-1", 1, {}, "0.1.0", probes=PROBES_STATE)
    assert decode(encode(said), Reported) == said


def test_a_report_over_as_many_graphs_as_are_allowed_fits_into_one_request() -> None:
    worst = 123.45678901234567
    timings = tuple(
        Timing(
            f"probe-{n:03d}-{'x' * 40}.onnx",
            quiet_ms=worst,
            halves_ms=(worst, worst),
            anchor_ms=worst,
            runs=100_000,
            p50_ms=worst,
            p95_ms=worst,
            memory_bytes=2**36,
            load_ms=worst,
            p99_ms=worst,
            alone_runs=100_000,
        )
        for n in range(MAX_GRAPHS)
    )
    report = ProbeReport(
        probes="a" * 64,
        device_class="x" * 200,
        runtime="onnxruntime 1.20.1",
        threads=4,
        hardware="real",
        timings=timings,
        seconds=worst,
        complete=True,
        notes=("hot 81 C", "load 3.2") * 20,
    )
    data = encode(Request("report", index=3, body=msgspec.Raw(msgspec.json.encode(report))))
    assert len(data) < MAX_CONTROL_BYTES
    assert decode_probe_report(bytes(decode(data, Request).body)) == report


@pytest.mark.parametrize(
    "path", ["", "probes/x.json", f"probes/{'A' * 64}.json", f"probes/../{'a' * 64}.json", "a" * 64]
)
def test_only_a_digest_names_a_probe_set(path: str) -> None:
    assert digest_in(probes_path("a" * 64)) == "a" * 64
    with pytest.raises(InputError, match="not the path"):
        digest_in(path)


def test_a_request_to_measure_has_limits(tmp_path) -> None:
    probes = make_probes(tmp_path, graphs=2, size=100)
    check_limits(probes, MAX_SECONDS, MAX_THREADS)
    replace = msgspec.structs.replace
    fat = replace(probes.graphs[0], artifact=replace(probes.graphs[0].artifact, bytes=MAX_BYTES))
    for refused, seconds, threads, what in (
        (probes, MAX_SECONDS + 1, 1, "seconds"),
        (probes, 0.0, 1, "seconds"),
        (probes, float("nan"), 1, "seconds"),
        (probes, 60.0, MAX_THREADS + 1, "threads"),
        (probes, 60.0, 0, "threads"),
        (replace(probes, graphs=probes.graphs * MAX_GRAPHS), 60.0, 1, "graphs"),
        (replace(probes, graphs=(fat, fat)), 60.0, 1, "bytes"),
    ):
        with pytest.raises(InputError, match=what):
            check_limits(refused, seconds, threads)


@pytest.mark.parametrize("name", ["../up", "", "press-3\n", "UPPER", "a" * 64])
def test_a_wish_for_what_cannot_be_a_line_is_refused_whole(name) -> None:
    body = msgspec.json.encode({"generation": 1, "lines": {name: {"target": "lines/press-3/1.json"}}})
    with pytest.raises(InputError, match="cannot be read"):
        decode(body, Desired)
