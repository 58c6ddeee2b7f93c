"""Work beside the agent's own loop, which meanwhile hears what the server wants."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol


class IdleWork(Protocol):
    """What the agent does only while every line rests."""

    def go_on(self) -> None:
        """Begin if something is due; returns at once. Raises what the work ended with, if that was a defect."""

    def is_open(self) -> bool:
        """Whether somebody waits for it: it is under way or due."""

    def pause(self) -> None:
        """Interrupt it and return once it has stopped; raises as :meth:`go_on`."""


class Background:
    """One piece of work at a time, in a thread of its own.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._cancel = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def is_running(self) -> bool:
        """Whether work is under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, work: Callable[[threading.Event], None]) -> None:
        """Begin ``work``, which has to end soon after its event is set; what was before has ended (:meth:`stop`)."""
        self._cancel.clear()
        self._thread = threading.Thread(target=self._body, args=(work,), name=self._name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Interrupt the work and return once it has ended.

        Raises: what the thread ended with since the last call; nobody else would hear of it.
        """
        self._cancel.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _body(self, work: Callable[[threading.Event], None]) -> None:
        try:
            work(self._cancel)
        except BaseException as error:  # noqa: BLE001 - handed over to the agent's own thread
            self._failure = error
