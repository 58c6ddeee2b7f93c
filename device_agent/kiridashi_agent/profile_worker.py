"""Lets a profile be measured beside the agent's own loop."""

from __future__ import annotations

from kiridashi.messages import ProbesDesired

from kiridashi_agent.background import Background
from kiridashi_agent.profile_task import ProfileTask


class ProfileWorker:
    """Runs the task while the agent lets it; see :class:`~kiridashi_agent.background.IdleWork`."""

    def __init__(self, task: ProfileTask) -> None:
        self._task = task
        self._background = Background("kiridashi-profile")

    def adopt(self, wanted: ProbesDesired | None) -> None:
        """Take the server's wish; work on another one ends first."""
        if self._task.is_news(wanted):
            self.pause()
            self._task.adopt(wanted)

    def is_open(self) -> bool:
        """Whether there is something to do."""
        return self._task.is_open()

    def go_on(self) -> None:
        """Work on the task if there is one."""
        if self._background.is_running():
            return
        self.pause()
        if self._task.is_open():
            self._background.start(self._task.run)

    def pause(self) -> None:
        """Interrupt the task."""
        self._background.stop()
