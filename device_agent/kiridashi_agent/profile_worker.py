"""Lets a profile be measured beside the agent's own loop, which meanwhile hears what the server wants."""

from __future__ import annotations

import threading

from kiridashi.messages import ProbesDesired

from kiridashi_agent.profile_task import ProfileTask


class ProfileWorker:
    """Runs the task in a thread of its own while the agent lets it, so that a new wish is heard meanwhile."""

    def __init__(self, task: ProfileTask) -> None:
        self._task = task
        self._cancel = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def adopt(self, wanted: ProbesDesired | None) -> None:
        """Take the server's wish; work on another one ends first."""
        if self._task.is_news(wanted):
            self.pause()
            self._task.adopt(wanted)

    def is_open(self) -> bool:
        """Whether there is something to do."""
        return self._task.is_open()

    def go_on(self) -> None:
        """Work on the task if there is one.

        Raises: what the thread ended with, if that was a defect.
        """
        if self._thread is not None and self._thread.is_alive():
            return
        self.pause()
        if self._task.is_open():
            self._cancel.clear()
            self._thread = threading.Thread(target=self._body, name="kiridashi-profile", daemon=True)
            self._thread.start()

    def pause(self) -> None:
        """Interrupt the task and return once it has stopped; raises as :meth:`go_on`."""
        self._cancel.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _body(self) -> None:
        try:
            self._task.run(self._cancel)
        except BaseException as error:  # noqa: BLE001 - handed over to the agent's own thread
            self._failure = error
