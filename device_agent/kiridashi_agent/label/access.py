"""Who may use the page: which names a browser may call it by, whether a form is ours, and the code for other hosts.

A page of somebody else's can make a browser send requests here. Three things stop it: the ``Host`` must be an address
or a name given by the operator (a rebound DNS name is neither), a form must carry the secret that only our own pages
show, and what browsers say of a request's origin must be this page.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

CODE_LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"
CODE_LENGTH = 10
MAX_WRONG = 10
WRONG_WINDOW_S = 60.0


@dataclass
class Access:
    """The secrets of one start of the page; ``code`` is empty when it is open to this machine only."""

    names: frozenset[str]
    code: str
    form_secret: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    cookie_secret: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    _wrong_at_s: list[float] = field(default_factory=list)

    @classmethod
    def to(cls, bind: str, names: tuple[str, ...] = ()) -> Access:
        """Access for an address to listen on; a code is made unless that is the loopback."""
        loopback = ipaddress.ip_address(bind).is_loopback
        code = "" if loopback else "".join(secrets.choice(CODE_LETTERS) for _ in range(CODE_LENGTH))
        return cls(frozenset({"localhost", *(name.lower() for name in names)}), code)

    def knows_host(self, host: str) -> bool:
        """Whether a ``Host`` header names this page: an address, localhost, or a name that was given."""
        name = host.strip().lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name in self.names
        return bool(self.code) or address.is_loopback

    def is_own_request(self, headers: Mapping[str, str]) -> bool:
        """Whether what a browser says of a request's origin is this page; other programs say nothing of it."""
        origin, site = headers.get("Origin"), headers.get("Sec-Fetch-Site")
        if origin is not None and origin != f"http://{headers.get('Host')}":
            return False
        return site in (None, "same-origin", "none")

    def is_own_form(self, secret: str) -> bool:
        """Whether a form came from a page of this start."""
        return _equal(secret, self.form_secret)

    def is_entered(self, cookie: str) -> bool:
        """Whether a visitor may see frames."""
        return not self.code or _equal(cookie, self.cookie_secret)

    def is_waiting(self, now_s: float) -> bool:
        """Whether so many wrong codes came within a minute that none is looked at."""
        self._wrong_at_s = [at_s for at_s in self._wrong_at_s if now_s - at_s < WRONG_WINDOW_S]
        return len(self._wrong_at_s) >= MAX_WRONG

    def try_code(self, code: str, now_s: float) -> bool:
        """Compare a code that somebody typed, and remember a wrong one."""
        if _equal(code.strip().lower(), self.code):
            return True
        self._wrong_at_s.append(now_s)
        return False


def _equal(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode(), wanted.encode())
