"""The wire protocol: topics, names, limits, versions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kiridashi.errors import InputError, KiridashiError
from kiridashi.messages import (
    MAX_CONTROL_BYTES,
    Desired,
    LineDesired,
    Reported,
    Request,
    check_name,
    decode,
    device_of,
    device_topic,
    encode,
    event_topic,
    target_path,
)


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


def test_a_newer_minor_version_is_read_and_another_major_is_not() -> None:
    newer = b'{"generation":1,"lines":{},"protocol":"1.7","something":"new"}'
    assert decode(newer, Desired).generation == 1
    with pytest.raises(InputError, match=r"protocol 2\.0"):
        decode(newer.replace(b"1.7", b"2.0"), Desired)


def test_a_message_over_the_limit_is_not_parsed() -> None:
    with pytest.raises(InputError, match="64 KiB"):
        decode(b" " * (MAX_CONTROL_BYTES + 1), Request)
