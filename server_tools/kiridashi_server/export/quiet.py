"""Silence around libraries that talk: progress bars, banners, and messages from native code."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator

_LOGGERS = ("torch", "torch.onnx", "onnxscript", "onnx_ir", "absl")
_STDERR = 2


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Drop what exporters and runtimes print while the block runs; exceptions pass unchanged.

    Warnings, log records below error level, Python's standard streams and the process's standard error (where
    native code writes) are silenced. All of these belong to the whole process, so keep the block short and
    do not enter it from two threads at once.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name in _LOGGERS:
            stack.enter_context(_at_least_error(logging.getLogger(name)))
        stack.enter_context(_root_logger_kept())
        stack.enter_context(_native_stderr_dropped())
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


@contextlib.contextmanager
def _at_least_error(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _root_logger_kept() -> Iterator[None]:
    """Some libraries configure logging for the whole process when they are imported; that is undone."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


@contextlib.contextmanager
def _native_stderr_dropped() -> Iterator[None]:
    try:
        kept = os.dup(_STDERR)
    except OSError:  # the process was started without a standard error: nothing to drop
        yield
        return
    try:
        with open(os.devnull, "wb") as sink:  # noqa: PTH123 (a device, not a path of ours)
            sys.stderr.flush()
            os.dup2(sink.fileno(), _STDERR)
        yield
    finally:
        os.dup2(kept, _STDERR)
        os.close(kept)
