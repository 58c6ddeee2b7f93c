from __future__ import annotations

import logging
import os
import sys
import warnings

import pytest
from kiridashi_server.export.quiet import quiet_libraries


def test_nothing_comes_through_and_everything_is_restored(capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("onnxscript")
    level = logger.level
    with quiet_libraries():
        print("python")
        sys.stderr.write("python error\n")
        os.write(2, b"native\n")
        warnings.warn("a warning", stacklevel=1)
        assert not logger.isEnabledFor(logging.WARNING)
    os.write(2, b"after\n")
    print("after")
    captured = capfd.readouterr()
    assert captured.out == "after\n"
    assert captured.err == "after\n"
    assert logger.level == level


def test_errors_pass(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="reason"), quiet_libraries():
        raise RuntimeError("reason")
    os.write(2, b"heard\n")
    assert capfd.readouterr().err == "heard\n"


def test_what_a_library_does_to_the_root_logger_is_undone() -> None:
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    with quiet_libraries():
        root.addHandler(logging.StreamHandler())
        root.setLevel(logging.INFO)
    assert (root.level, root.handlers) == (level, handlers)
