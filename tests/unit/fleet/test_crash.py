"""A crash at any write of any change leaves a repository that devices can read and that can be written again."""

from __future__ import annotations

from datetime import timedelta

import pytest
from kiridashi.artifacts import write_atomic
from kiridashi_server.fleet import repository as module


class PowerCutError(BaseException):
    """Not an Exception: nothing in the code under test may catch it."""


@pytest.fixture
def cut_at(monkeypatch):
    """Arms a power cut before the n-th write; returns how many writes there were when called without a number."""

    def arm(number):
        count = 0

        def write(path, data, mode=0o644):
            nonlocal count
            if count == number:
                raise PowerCutError
            count += 1
            write_atomic(path, data, mode)

        monkeypatch.setattr(module, "write_atomic", write)
        return lambda: count

    return arm


CHANGES = {
    "publish": (lambda repository, now: repository.publish_target("press-3", 2, b"two", now), 4),
    "add line": (lambda repository, now: repository.add_line("paint-9", now), 4),
    "publish the first probe set": (lambda repository, now: repository.publish_probes(b"probes", now), 5),
    "refresh": (lambda repository, now: repository.refresh_timestamp(now + timedelta(days=20)), 2),
    "rotate root": (lambda repository, now: repository.rotate_root_key(now), 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_power_cut_before_any_write_is_harmless(repository, new_device, now, cut_at, change):
    run, writes = CHANGES[change]
    repository.publish_target("press-3", 1, b"one", now)
    device = new_device("before")
    for number in range(writes):
        cut_at(number)
        with pytest.raises(PowerCutError):
            run(repository, now)
        assert device.fetch("lines/press-3/1.json") == b"one"
        assert device.fetch("lines/press-3/2.json") is None
        assert new_device(f"fresh-{number}").fetch("lines/press-3/1.json") == b"one"
    count = cut_at(-1)
    run(repository, now)
    assert count() == writes  # every write was cut once
    assert device.fetch("lines/press-3/1.json") == b"one"
    if change == "publish":
        assert device.fetch("lines/press-3/2.json") == b"two"


def test_other_content_after_a_cut_is_a_new_start(repository, device, now, cut_at):
    """What was written but never committed was never promised to anybody."""
    cut_at(3)
    with pytest.raises(PowerCutError):
        repository.publish_target("press-3", 1, b"cut", now)
    cut_at(-1)
    repository.publish_target("press-3", 1, b"whole", now)
    assert device.fetch("lines/press-3/1.json") == b"whole"
    assert repository.published.read_target("lines/press-3/1.json") == b"whole"
