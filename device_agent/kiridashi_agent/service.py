"""Being a service: what the service manager is told, and how it finds out that the agent no longer turns.

The protocol is that of sd_notify(3): a datagram with assignments, a line each, to the socket that ``NOTIFY_SOCKET``
names. Without such a socket nothing is sent.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, MutableMapping

from kiridashi_agent.logs import RateLimited

_LOG = logging.getLogger(__name__)
_SEND_TIMEOUT_S = 1.0
_SLOWEST_BEAT_S = 30.0


class ServiceManager:
    """The socket of the manager (systemd) at ``address``, which waits ``watchdog_s`` for a sign of life (0: for ever).

    An address that starts with ``@`` is in the abstract namespace.
    """

    def __init__(self, address: str = "", watchdog_s: float = 0.0) -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self.watchdog_s = watchdog_s
        self._quiet = RateLimited(_LOG, every_s=60.0)

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str], pid: int) -> ServiceManager:
        """The manager that started process ``pid``. Its variables are taken out: children must not speak for us."""
        address = environment.pop("NOTIFY_SOCKET", "")
        watched = environment.pop("WATCHDOG_PID", "") in ("", str(pid))
        microseconds = environment.pop("WATCHDOG_USEC", "")
        return cls(address, int(microseconds) / 1e6 if watched and microseconds.isdecimal() else 0.0)

    @property
    def listens(self) -> bool:
        """Whether anybody is told anything."""
        return bool(self._address)

    def tell(self, **assignments: str) -> None:
        """Send one message, such as ``READY="1"``. One that cannot be sent is logged: it must not end the agent."""
        if not self.listens:
            return
        text = "\n".join(f"{name}={' '.join(value.split())}" for name, value in assignments.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(_SEND_TIMEOUT_S)
                sender.sendto(text.encode(), self._address)
        except OSError as error:
            self._quiet.warning("the service manager could not be told: %s", error)


class StopSignal(threading.Event):
    """The event that ends the agent. Every loop of the agent's own thread asks for it, so asking is the sign of life.

    Three times in the manager's waiting time it is passed on, with a line of status, as long as ``is_well``.

    Args:
        manager: who is told.
        is_well: whether the rest of the process lives, too.
        status: the line of status.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        manager: ServiceManager,
        is_well: Callable[[], bool],
        status: Callable[[], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._manager = manager
        self._is_well = is_well
        self._status = status
        self._clock = clock
        self._every_s = min(_SLOWEST_BEAT_S, manager.watchdog_s / 3 or _SLOWEST_BEAT_S)
        self._next = clock()

    def is_set(self) -> bool:
        """See :meth:`threading.Event.is_set`."""
        if self._manager.listens and self._clock() >= self._next and self._is_well():
            self._next = self._clock() + self._every_s
            self._manager.tell(WATCHDOG="1", STATUS=self._status())
        return super().is_set()
