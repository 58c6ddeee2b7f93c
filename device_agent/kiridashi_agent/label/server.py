"""The HTTP server of the page, on the standard library: few connections, small requests, short waits."""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from kiridashi.errors import InputError, KiridashiError, StateError

from kiridashi_agent.label.access import Access
from kiridashi_agent.label.page import MAX_INITIALS, Visit, enter_page, error_page, naming_page, who_page
from kiridashi_agent.label.png import encode_png
from kiridashi_agent.label.session import LabelGoal, LabelSession, View
from kiridashi_agent.label.texts import LANGUAGES, Language, preferred_language

MAX_CONNECTIONS = 8
MAX_BODY_BYTES = 4096
SOCKET_TIMEOUT_S = 10.0
_CANNOT_WRITE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})
_YEAR_S = 365 * 24 * 3600
_STATIC = {"/label.css": "text/css; charset=utf-8", "/label.js": "text/javascript; charset=utf-8"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_log = logging.getLogger(__name__)


class LabelServer(ThreadingHTTPServer):
    """Serves one line's session at ``bind`` (an IP address) and ``port`` (0 takes a free one).

    ``current_goal`` is asked before a frame is shown, so that the page follows the line to another model.

    Raises:
        OSError: the address cannot be used.
    """

    daemon_threads = True

    def __init__(
        self,
        bind: str,
        port: int,
        line: str,
        session: LabelSession,
        access: Access,
        current_goal: Callable[[], LabelGoal] | None = None,
    ) -> None:
        self.line, self.session, self.access = line, session, access
        self._current_goal = current_goal
        self.lock = threading.Lock()
        self.address_family = socket.AF_INET6 if ipaddress.ip_address(bind).version == 6 else socket.AF_INET
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__((bind, port), _Handler)

    def view(self) -> View:
        """What to show now. Raises as :meth:`LabelSession.view`."""
        with self.lock:
            if self._current_goal is not None:
                try:
                    self.session.aim_at(self._current_goal())
                except KiridashiError as error:
                    _log.error("line=%s the classes stay as they were: %s", self.line, error)
            return self.session.view()

    def process_request(self, request: Any, client_address: Any) -> None:
        """A connection over the limit is closed at once."""
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection, then give its place back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke off is no concern of the page."""
        _log.debug("a connection from %s ended early", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: LabelServer
    timeout = SOCKET_TIMEOUT_S
    server_version, sys_version = "kiridashi", ""

    def do_GET(self) -> None:
        """Pages, pictures, and the two files that a page needs."""
        url = urlsplit(self.path)
        if not self.server.access.knows_host(self.headers.get("Host", "")):
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST)
        elif url.path in _STATIC:
            data = files("kiridashi_agent.label").joinpath("static", url.path[1:]).read_bytes()
            self._send(data, _STATIC[url.path])
        elif not self._is_entered():
            self._enter(parse_qs(url.query).get("code", [""])[0])
        elif url.path == "/":
            self._naming(parse_qs(url.query).get("lang", [""])[0])
        elif url.path == "/who":
            self._who()
        elif url.path.startswith("/frame/") and url.path.endswith(".png"):
            self._picture(url.path.removeprefix("/frame/").removesuffix(".png"))
        else:
            self._refuse(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        """Answers, undoing, initials and the code."""
        access, path = self.server.access, urlsplit(self.path).path
        form = self._form()
        if not access.knows_host(self.headers.get("Host", "")):
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST)
        elif form is None or not access.is_own_request(dict(self.headers)):
            self._refuse(HTTPStatus.FORBIDDEN)
        elif not access.is_own_form(form.get("secret", "")):
            self._page(error_page(self._visit(), "error_stale"), HTTPStatus.FORBIDDEN)
        elif path == "/enter":
            self._enter(form.get("code", ""))
        elif not self._is_entered():
            self._enter("")
        elif path == "/who":
            self._redirect({"by": _initials(form.get("pick", form.get("by", "")))})
        elif path in ("/answer", "/undo"):
            self._change(path, form)
        else:
            self._refuse(HTTPStatus.NOT_FOUND)

    def log_message(self, *args: Any) -> None:
        """Requests are no news."""
        _log.debug(*args)

    def _change(self, path: str, form: Mapping[str, str]) -> None:
        now_s, by = time.time(), self._visit().by
        kind, _, label = form.get("answer", "").partition(":")
        entry = form.get("entry", "")
        session = self.server.session
        try:
            with self.server.lock:
                if path == "/undo":
                    session.undo(form.get("id", ""), by, now_s)
                elif kind == "class" or (kind in ("none", "unsure") and not label):
                    session.answer(entry, kind, label, by, now_s)  # type: ignore[arg-type]
                else:
                    raise InputError(f"'{kind}' is not an answer")
        except InputError:
            self._page(error_page(self._visit(), "error_refused"), HTTPStatus.BAD_REQUEST)
        except StateError as error:
            _log.error("%s", error)
            key = "error_full" if isinstance(error.__cause__, OSError) else "error_gone"
            status = HTTPStatus.INSUFFICIENT_STORAGE if key == "error_full" else HTTPStatus.CONFLICT
            self._page(error_page(self._visit(), key), status)
        else:
            self._redirect()

    def _naming(self, language: str) -> None:
        if language in LANGUAGES:
            self._redirect({"lang": language})
            return
        try:
            view = self.server.view()
        except (KiridashiError, OSError) as error:
            self._cannot_show(error)
            return
        self._page(naming_page(self._visit(), view))

    def _who(self) -> None:
        try:
            with self.server.lock:
                people = self.server.session.people()
        except StateError as error:
            self._cannot_show(error)
            return
        self._page(who_page(self._visit(), people))

    def _cannot_show(self, error: KiridashiError | OSError) -> None:
        """Say whether there was no room to claim a frame, or something cannot be read."""
        _log.error("%s", error)
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(cause, OSError) and cause.errno in _CANNOT_WRITE:
            self._page(error_page(self._visit(), "error_full"), HTTPStatus.INSUFFICIENT_STORAGE)
        else:
            self._page(error_page(self._visit(), "error_read"), HTTPStatus.INTERNAL_SERVER_ERROR)

    def _picture(self, entry: str) -> None:
        with self.server.lock:
            frame = self.server.session.frame(entry)
        if frame is None:
            self._refuse(HTTPStatus.NOT_FOUND)
        else:
            self._send(encode_png(frame.pixels, frame.header.height, frame.header.width), "image/png")

    def _enter(self, code: str) -> None:
        """Let somebody in who has the code; everybody else gets the page that asks for it."""
        access, now_s = self.server.access, time.monotonic()
        with self.server.lock:
            is_waiting = access.is_waiting(now_s)
            is_right = bool(code) and not is_waiting and access.try_code(code, now_s)
        if is_right:
            self._redirect({"key": access.cookie_secret})
            return
        problem = "enter_wait" if is_waiting else "enter_wrong" if code else ""
        status = HTTPStatus.TOO_MANY_REQUESTS if is_waiting else HTTPStatus.FORBIDDEN
        self._page(enter_page(self._visit(), problem), status)

    def _is_entered(self) -> bool:
        return self.server.access.is_entered(self._cookie("key"))

    def _visit(self) -> Visit:
        chosen = self._cookie("lang")
        accepted = preferred_language(self.headers.get("Accept-Language", ""))
        language: Language = "ja" if chosen == "ja" else "en" if chosen == "en" else accepted
        return Visit(self.server.line, language, _initials(self._cookie("by")), self.server.access.form_secret)

    def _cookie(self, name: str) -> str:
        """Cookies are named by port, because a browser gives those of one port to all others of the host."""
        try:
            morsel = SimpleCookie(self.headers.get("Cookie", "")).get(f"kiridashi_{name}_{self.server.server_port}")
        except CookieError:
            return ""
        return unquote(morsel.value) if morsel else ""

    def _form(self) -> dict[str, str] | None:
        """The fields of a small form; ``None`` if it is not one."""
        length = self.headers.get("Content-Length", "")
        kind = self.headers.get_content_type()
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES or kind != "application/x-www-form-urlencoded":
            self.close_connection = True
            return None
        try:
            fields = parse_qs(self.rfile.read(int(length)).decode(), keep_blank_values=True, max_num_fields=8)
        except (ValueError, OSError):
            return None
        return {name: values[0] for name, values in fields.items()}

    def _page(self, html: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(html.encode(), "text/html; charset=utf-8", status)

    def _refuse(self, status: HTTPStatus) -> None:
        self._send(status.phrase.encode(), "text/plain; charset=utf-8", status)

    def _redirect(self, cookies: Mapping[str, str] | None = None) -> None:
        self.send_response(HTTPStatus.SEE_OTHER)
        self.send_header("Location", "/")
        for name, value in (cookies or {}).items():
            jar: SimpleCookie = SimpleCookie()
            key = f"kiridashi_{name}_{self.server.server_port}"
            jar[key] = quote(value, safe="")
            attributes = {"path": "/", "httponly": True, "samesite": "Strict"}
            for attribute, setting in (attributes if name == "key" else attributes | {"max-age": _YEAR_S}).items():
                jar[key][attribute] = setting
            self.send_header("Set-Cookie", jar.output(header="").strip())
        self._finish(b"")

    def _send(self, data: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self._finish(data)

    def _finish(self, data: bytes) -> None:
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _initials(text: str) -> str:
    """What somebody typed as initials, without what could not be shown."""
    return "".join(letter for letter in text.strip() if letter.isprintable())[:MAX_INITIALS].strip()
