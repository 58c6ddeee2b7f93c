"""A local HTTP server for line applications in other languages: the Open Inference Protocol (KServe v2).

For programs on the same machine (C#, C++, a PLC gateway). Standard library only. It speaks plain HTTP and asks nobody
who they are, so it listens on loopback unless told otherwise. What it accepts is bounded: connections, requests at
once, bytes, frames and time. Errors are answered as ``{"error": "…"}``.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec

import kiridashi
from kiridashi.errors import InputError, KiridashiError, StateError
from kiridashi.inference_protocol import Body, decode_request, encode_answer, model_metadata
from kiridashi.line import LineModel
from kiridashi.line_routes import Place, RefusedError, is_loopback, number, place_of, split_url, status_of

DEFAULT_PORT = 8090
JSON_LENGTH_HEADER = "Inference-Header-Content-Length"
_PIECE_BYTES = 64 * 1024
_LINGER_S = 1.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerLimits:
    """What a server accepts.

    Attributes:
        body_bytes: of one request.
        frames: in one request.
        requests: read and predicted at once; others wait.
        wait_s: how long they wait for their turn.
        connections: open at once.
        timeout_s: for the client to send a request, and between two of them.
    """

    body_bytes: int = 32 * 1024 * 1024
    frames: int = 32
    requests: int = 4
    wait_s: float = 2.0
    connections: int = 32
    timeout_s: float = 30.0


class LineServer(ThreadingHTTPServer):
    """Serves open models by their lines' names; run it with ``serve_forever``, end it with :meth:`close`.

    Raises:
        InputError: ``host`` is not loopback and ``allow_remote`` is not set, or ``port`` is none.
        StateError: the address is in use or not this machine's.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        models: Mapping[str, LineModel],
        host: str = "127.0.0.1",
        port: int = DEFAULT_PORT,
        limits: ServerLimits | None = None,
        *,
        allow_remote: bool = False,
    ) -> None:
        if not allow_remote and not is_loopback(host):
            raise InputError(
                f"'{host}' is not a loopback address",
                why="the server has neither encryption nor a password: whoever reaches it can use the models",
                next_step="use 127.0.0.1, or allow it with --allow-remote in a network of its own",
            )
        if not 0 <= port <= 65535:
            raise InputError(f"{port} is not a port", why="ports are 1 to 65535, and 0 takes a free one")
        self.models = dict(models)
        self.limits = limits or ServerLimits()
        self.turns = threading.BoundedSemaphore(self.limits.requests)
        self._connections = threading.BoundedSemaphore(self.limits.connections)
        self.waiting: dict[socket.socket, float] = {}
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise StateError(
                f"{host} port {port} cannot be listened on", why=str(error), next_step="choose another --port or --host"
            ) from error

    @property
    def url(self) -> str:
        """Where clients find the server."""
        host, port = self.server_address[:2]
        return f"http://[{host!s}]:{port}" if self.address_family == socket.AF_INET6 else f"http://{host!s}:{port}"

    def close(self, grace_s: float = 5.0) -> None:
        """Accept nothing more and wait until predictions under way are answered; the models stay open."""
        self.server_close()
        deadline = time.monotonic() + grace_s
        for _ in range(self.limits.requests):
            self.turns.acquire(timeout=max(0.0, deadline - time.monotonic()))

    def server_bind(self) -> None:
        """Bind without the look-up of a host name that the base class makes."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def service_actions(self) -> None:
        """Now and then: end connections whose next request, sent byte by byte, has not begun in time."""
        for connection, deadline in list(self.waiting.items()):
            if time.monotonic() > deadline:
                with contextlib.suppress(OSError):  # it ended by itself
                    connection.shutdown(socket.SHUT_RD)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection its thread, or refuse it when there are too many."""
        if not self._connections.acquire(blocking=False):
            _log.warning("refused a connection: %d are open", self.limits.connections)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread to be had
            self._connections.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection to its end."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients go away in the middle of things; anything else is a defect. Either way the server goes on."""
        gone = isinstance(sys.exc_info()[1], OSError)
        level = logging.INFO if gone else logging.ERROR
        _log.log(level, "a connection from %s ended early", client_address, exc_info=not gone)


class _Handler(BaseHTTPRequestHandler):
    server: LineServer
    protocol_version = "HTTP/1.1"
    server_version = "kiridashi"
    sys_version = ""
    disable_nagle_algorithm = True
    wbufsize = -1

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(self.server.limits.timeout_s)
        self._unread = self._has_turn = False

    def handle_one_request(self) -> None:
        """One request, whose first line and headers have to be there in time."""
        self.server.waiting[self.connection] = time.monotonic() + self.server.limits.timeout_s
        try:
            super().handle_one_request()
        finally:
            self.server.waiting.pop(self.connection, None)

    def do_GET(self) -> None:
        self._unread = "Content-Length" in self.headers
        self.close_connection |= self._unread
        self._answer(lambda path: Body(msgspec.json.encode(self._look_up(path))))

    def do_POST(self) -> None:
        self._unread, self._has_turn = True, False
        try:
            self._answer(self._infer)
        finally:
            if self._has_turn:
                self.server.turns.release()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        _log.debug(format, *args)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses (a malformed request, an unknown method), answered as all errors are."""
        self.close_connection = True
        self._send(code, Body(msgspec.json.encode({"error": message or HTTPStatus(code).phrase})))

    def _answer(self, work: Callable[[list[str]], Body]) -> None:
        self.server.waiting.pop(self.connection, None)
        try:
            self._send(HTTPStatus.OK, work(split_url(self.path)))
        except RefusedError as error:
            self._refuse(error.status, str(error))
        except KiridashiError as error:
            self._refuse(status_of(error), f"{error} ({error.next_step})" if error.next_step else str(error))

    def _look_up(self, path: list[str]) -> dict[str, Any]:
        match path:
            case ["v2"]:
                version = kiridashi.__version__
                return {"name": "kiridashi", "version": version, "extensions": ["binary_tensor_data"]}
            case ["v2", "health", "live"]:
                return {"live": True}
            case ["v2", "health", "ready"]:
                for model in self.server.models.values():
                    model.info()  # raises if the model was closed
                return {"ready": True}
        place = place_of(path)
        if place is None or place.action not in ("", "ready"):
            raise RefusedError(HTTPStatus.NOT_FOUND, f"there is nothing at {self.path}")
        model = self._model(place)
        ready = {"name": place.line, "ready": True}
        return ready if place.action else model_metadata(model.info(), model.labels)

    def _model(self, place: Place) -> LineModel:
        model = self.server.models.get(place.line)
        if model is None:
            raise RefusedError(HTTPStatus.NOT_FOUND, f"no line '{place.line}' is served here")
        place.check(model.info().version)
        return model

    def _infer(self, path: list[str]) -> Body:
        place = place_of(path)
        if place is None or place.action != "infer":
            raise RefusedError(HTTPStatus.NOT_FOUND, f"nothing can be posted to {self.path}")
        model, length = self._model(place), self._length()
        self._has_turn = self.server.turns.acquire(timeout=self.server.limits.wait_s)
        if not self._has_turn:
            raise RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests at once; try again")
        json_bytes = self.headers.get(JSON_LENGTH_HEADER)
        body = Body(self._read(length), None if json_bytes is None else number(json_bytes, JSON_LENGTH_HEADER))
        request = decode_request(body, self.server.limits.frames)
        prediction = model.predict(request.frames)
        place.check(prediction.version)  # the model may have changed over since it was looked at
        return encode_answer(place.line, request, prediction)

    def _length(self) -> int:
        """The announced length of the body, checked before anything of it is read."""
        if self.headers.get("Content-Encoding", "identity") != "identity":
            raise RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "compressed bodies are not read")
        announced = self.headers.get("Content-Length")
        if announced is None or "Transfer-Encoding" in self.headers:
            raise RefusedError(HTTPStatus.LENGTH_REQUIRED, "a Content-Length is needed; chunked bodies are not read")
        length, most = number(announced, "Content-Length"), self.server.limits.body_bytes
        if length > most:
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{length} bytes; at most {most} are read")
        return length

    def _read(self, length: int) -> bytes:
        """The whole body, growing as it comes, inside one time limit."""
        deadline = time.monotonic() + self.server.limits.timeout_s
        data = bytearray()
        while len(data) < length:
            try:
                piece = self.rfile.read1(min(_PIECE_BYTES, length - len(data)))
            except TimeoutError:
                piece = b""
            if not piece or time.monotonic() > deadline:
                raise RefusedError(HTTPStatus.REQUEST_TIMEOUT, f"{len(data)} of {length} bytes came in time")
            data += piece
        self._unread = False
        return bytes(data)

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        self.close_connection |= self._unread
        self._send(status, Body(msgspec.json.encode({"error": text})))
        if self._unread:
            self._linger()

    def _linger(self) -> None:
        """Read on for a moment, or closing would reset the connection before the client has read the answer."""
        self.connection.settimeout(_LINGER_S)
        deadline = time.monotonic() + _LINGER_S
        try:
            self.connection.shutdown(socket.SHUT_WR)
            while self.rfile.read1(_PIECE_BYTES) and time.monotonic() < deadline:
                continue
        except OSError:
            return  # the client has gone, which is what was waited for

    def _send(self, status: int, body: Body) -> None:
        self.send_response(status)
        kind = "application/json" if body.json_bytes is None else "application/octet-stream"
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body.data)))
        if body.json_bytes is not None:
            self.send_header(JSON_LENGTH_HEADER, str(body.json_bytes))
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.send_header("Retry-After", "1")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body.data)
        self.wfile.flush()
