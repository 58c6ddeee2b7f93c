"""The inference protocol over real sockets, with a client of standard library calls."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kiridashi import LineModel
from kiridashi.errors import InputError, StateError
from kiridashi.line_routes import is_loopback
from kiridashi.line_server import LineServer, ServerLimits
from kiridashi.slots import Active

from tests.assets.tiny_bundle import LABELS, SIDE, make_bundle, server_tiles
from tests.integration.device_runtime.conftest import Device, install

IMAGES, TRUTH = server_tiles(2, 50)
INFER = "/v2/models/press-3/infer"
HEADER = "Inference-Header-Content-Length"


class Client:
    """A keep-alive connection to a server."""

    def __init__(self, server: LineServer) -> None:
        self.connection = http.client.HTTPConnection(*server.server_address[:2], timeout=20)

    def call(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        self.connection.request(method, path, body, headers or {})
        response = self.connection.getresponse()
        return response.status, json.loads(response.read())

    def infer(self, frames: np.ndarray, path: str = INFER, **more: Any) -> tuple[int, Any]:
        tensor = {"name": "frames", "datatype": "UINT8", "shape": list(frames.shape), "data": frames.ravel().tolist()}
        return self.call("POST", path, json.dumps({"inputs": [tensor], **more}).encode())

    def infer_binary(self, frames: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
        """The JSON part of the answer and the probabilities, both ways in binary form."""
        size = {"binary_data_size": frames.size}
        tensor = {"name": "frames", "datatype": "UINT8", "shape": list(frames.shape), "parameters": size}
        asked = [{"name": "probabilities", "parameters": {"binary_data": True}}, {"name": "label"}]
        head = json.dumps({"inputs": [tensor], "outputs": asked}).encode()
        self.connection.request("POST", INFER, head + frames.tobytes(), {HEADER: str(len(head))})
        response = self.connection.getresponse()
        body, length = response.read(), int(response.headers[HEADER])
        answer = json.loads(body[:length])
        shape = answer["outputs"][0]["shape"]
        return answer, np.frombuffer(body[length:], "<f4").reshape(shape)


@contextmanager
def serving(device: Device, limits: ServerLimits | None = None) -> Iterator[tuple[LineServer, LineModel]]:
    with LineModel(device.slots, look_interval_s=0.002) as model:
        server = LineServer({"press-3": model}, port=0, limits=limits)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server, model
        finally:
            server.shutdown()
            thread.join()
            server.close()


@pytest.fixture
def served(device: Device) -> Iterator[tuple[LineServer, LineModel]]:
    with serving(device) as pair:
        yield pair


@pytest.fixture
def client(served: tuple[LineServer, LineModel]) -> Client:
    return Client(served[0])


def test_health_and_metadata(client: Client, device: Device) -> None:
    assert client.call("GET", "/v2")[1]["extensions"] == ["binary_tensor_data"]
    assert client.call("GET", "/v2/health/live") == (200, {"live": True})
    assert client.call("GET", "/v2/health/ready") == (200, {"ready": True})
    assert client.call("GET", "/v2/models/press-3/ready") == (200, {"name": "press-3", "ready": True})
    assert client.call("GET", "/v2/models/press-3/versions/1/ready")[0] == 200
    status, model = client.call("GET", "/v2/models/press-3")
    assert (status, model["versions"], model["labels"]) == (200, ["1"], list(LABELS))
    assert model["inputs"] == [{"name": "frames", "datatype": "UINT8", "shape": [-1, -1, -1, 3]}]
    assert [output["datatype"] for output in model["outputs"]] == ["FP32", "INT64", "BYTES"]
    assert (model["platform"], model["model_digest"]) == ("onnxruntime_onnx", device.manifest.digest)
    assert client.call("GET", "/v2/models/press-3/versions/1") == (200, model)


def test_answers_are_what_the_model_says(client: Client, served: tuple[LineServer, LineModel]) -> None:
    expected = served[1].predict(IMAGES)
    status, answer = client.infer(IMAGES, id="7")
    values, index, label = (output["data"] for output in answer["outputs"])
    assert (status, answer["id"], answer["model_version"]) == (200, "7", "1")
    np.testing.assert_allclose(np.reshape(values, (-1, len(LABELS))), expected.values, atol=1e-6)
    assert index == TRUTH.tolist()
    assert label == [LABELS[n] for n in TRUTH]
    binary, probabilities = client.infer_binary(IMAGES)
    np.testing.assert_array_equal(probabilities, expected.values)
    assert binary["outputs"][1]["data"] == label
    large = np.repeat(np.repeat(IMAGES[0], 40, axis=0), 40, axis=1)
    assert client.infer_binary(large)[0]["outputs"][1]["data"] == [LABELS[TRUTH[0]]]


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/", 404, "nothing at /"),
        ("GET", "/v2/models", 404, "nothing at"),
        ("GET", "/v2/models/weld-1", 404, "no line 'weld-1'"),
        ("GET", "/v2/models/press-3/versions/2", 404, "serves version 1, not 2"),
        ("GET", "/v2/models/press-3/versions", 404, "nothing at"),
        ("GET", "/v2/models/press-3/versions/1/config", 404, "nothing at"),
        ("GET", "/v2/models/press-3/versions/1/infer", 404, ""),
        ("POST", "/v2/models/press-3/versions/2/infer", 404, "serves version 1, not 2"),
        ("POST", "/v2/models/press-3", 404, "nothing can be posted"),
        ("POST", "/v2/models/press-3/x/1/infer", 404, ""),
        ("DELETE", "/v2/models/press-3", 501, "Unsupported method"),
        ("POST", INFER, 400, "not that of the inference protocol"),
    ],
)
def test_wrong_requests_are_answered_with_an_error(
    client: Client, method: str, path: str, status: int, message: str
) -> None:
    client.connection.connect()
    kept = client.connection.sock
    seen, answer = client.call(method, path, b"{}" if method == "POST" else None)
    assert (seen, list(answer)) == (status, ["error"])
    assert message in answer["error"]
    whole = status == 400 or method == "GET"  # nothing of the request is left to read
    assert (client.connection.sock is kept) == whole
    assert client.call("GET", "/v2/health/live")[0] == 200


def raw(server: LineServer, data: bytes) -> bytes:
    """What the server answers to these bytes before it closes the connection."""
    with socket.create_connection(server.server_address[:2], timeout=20) as connection:
        connection.sendall(data)
        answer = b""
        while piece := connection.recv(4096):
            answer += piece
    return answer


def test_limits_of_a_request(device: Device) -> None:
    limits = ServerLimits(body_bytes=4000, frames=2, timeout_s=0.3)
    start = f"POST {INFER} HTTP/1.1\r\nHost: x\r\n".encode()
    with serving(device, limits) as (server, _):
        for extra, status in [
            (b"Content-Length: 4001\r\n\r\n", b"413"),
            (b"Content-Length: 99999999999999999999\r\n\r\n", b"400"),
            (b"Content-Length: -1\r\n\r\n", b"400"),
            (b"\r\n", b"411"),
            (b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n", b"411"),
            (b"Content-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc", b"415"),
            (b"Content-Length: 30\r\n\r\nabc", b"408"),
            (b"Content-Length: 2\r\nInference-Header-Content-Length: x\r\n\r\n{}", b"400"),
        ]:
            answer = raw(server, start + extra)
            assert answer.split(b" ")[1] == status, answer
            assert b'{"error":' in answer
        assert raw(server, b"nonsense\r\n\r\n").endswith(b"}")
        assert raw(server, b"GET http://[ HTTP/1.1\r\n\r\n").split(b" ")[1] == b"400"
        # The body of a GET is not taken for the next request.
        twice = b"GET /v2 HTTP/1.1\r\nContent-Length: 18\r\n\r\nGET / HTTP/1.1\r\n\r\n"
        assert raw(server, twice).count(b"HTTP/1.1 ") == 1
        # A body far over the limit, sent without waiting: the answer still arrives.
        assert raw(server, start + b"Content-Length: 900000\r\n\r\n" + bytes(900_000)).split(b" ")[1] == b"413"
        status, answer = Client(server).infer(IMAGES[:3, :4, :4])
        assert (status, "at most 2" in answer["error"]) == (400, True)
        assert Client(server).infer(IMAGES[0])[0] == 200


def ended(connection: socket.socket, deadline: float) -> bool:
    """Send on, byte by byte; whether the other side ended the connection before ``deadline``."""
    while time.monotonic() < deadline:
        try:
            connection.sendall(b"x")
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_headers_that_trickle_in_do_not_hold_a_connection(device: Device) -> None:
    with serving(device, ServerLimits(timeout_s=0.3)) as (server, _):
        with socket.create_connection(server.server_address[:2], timeout=20) as connection:
            started = time.monotonic()
            connection.sendall(b"GET /v2 HTTP/1.1\r\nX: ")
            assert ended(connection, started + 15)
            assert time.monotonic() < started + 10
        until(lambda: server.waiting == {})
        assert Client(server).infer(IMAGES)[0] == 200


def test_more_requests_than_may_run_at_once_are_told_to_come_back(device: Device) -> None:
    with serving(device, ServerLimits(requests=1, wait_s=0.05)) as (server, _):
        with server.turns:
            status, answer = Client(server).infer(IMAGES)
        assert (status, "try again" in answer["error"]) == (503, True)
        assert Client(server).infer(IMAGES)[0] == 200


def test_more_connections_than_allowed_are_closed(device: Device) -> None:
    with serving(device, ServerLimits(connections=2)) as (server, _):
        first, second, third = (Client(server) for _ in range(3))
        for client in (first, second):
            assert client.call("GET", "/v2/health/live")[0] == 200
        with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
            third.call("GET", "/v2/health/live")
        first.connection.close()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                third.connection.close()
                assert third.call("GET", "/v2/health/live")[0] == 200
                break
            except (http.client.RemoteDisconnected, ConnectionResetError):
                time.sleep(0.02)
        else:
            pytest.fail("the place of a closed connection was not given back")


def test_a_closed_model_is_not_ready(served: tuple[LineServer, LineModel], client: Client) -> None:
    served[1].close()
    assert client.call("GET", "/v2/health/live")[0] == 200
    assert client.call("GET", "/v2/health/ready")[0] == 503
    assert client.infer(IMAGES)[0] == 503


def test_no_request_is_lost_while_the_model_changes_over(device: Device, tmp_path: Path) -> None:
    make_bundle(tmp_path / "next", version=2, seed=3)
    manifest = install(device.slots, "b", tmp_path / "next")
    stop = threading.Event()
    with serving(device) as (server, model):

        def ask() -> list[tuple[str, list[int]]]:
            client, seen = Client(server), []
            while not stop.is_set():
                status, answer = client.infer(IMAGES)
                assert status == 200, answer
                seen.append((answer["model_version"], answer["outputs"][1]["data"]))
            return seen

        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(ask) for _ in range(3)]
            for _ in range(3):
                device.slots.activate(Active(slot="b", artifact="model.tflite", model_digest=manifest.digest))
                until(lambda: model.active.slot == "b")
                device.slots.rollback()
                until(lambda: model.active.slot == "a")
            stop.set()
            rows = [row for future in asked for row in future.result(20)]
    assert {version for version, _ in rows} == {"1", "2"}
    assert all(index == TRUTH.tolist() for _, index in rows)


def until(condition: Any) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)


def test_only_loopback_unless_allowed(device: Device) -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "plant.example")] == [
        *(True, True, True),
        *(False, False),
    ]
    with pytest.raises(InputError, match="not a loopback address"):
        LineServer({}, host="0.0.0.0", port=0)
    open_to_all = LineServer({}, host="0.0.0.0", port=0, allow_remote=True)
    try:
        with pytest.raises(StateError, match="cannot be listened on"):
            LineServer({}, port=open_to_all.server_address[1])
    finally:
        open_to_all.server_close()


def test_the_example_of_the_guide(served: tuple[LineServer, LineModel], capsys: pytest.CaptureFixture[str]) -> None:
    guide = (Path(__file__).parents[3] / "docs" / "how-to" / "line-application.md").read_text()
    (example,) = [block for block in guide.split("```python\n") if block.startswith("import http.client")]
    code = example.partition("```")[0].replace("8090", str(served[0].server_address[1]))
    exec(compile(code, "line-application.md", "exec"), {})
    black = np.zeros((480, 640, 3), np.uint8)
    assert capsys.readouterr().out == f"{served[1].predict(black).label}\n"


def test_the_command_serves_and_stops_on_request(device: Device) -> None:
    command = [sys.executable, "-m", "kiridashi.line_command", "serve", "--line", "press-3", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--state", str(device.state_dir), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("serving press-3 at http://127.0.0.1:"), line
        port = int(line.split("/v2")[0].rpartition(":")[2])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/v2/models/press-3")
        assert json.loads(connection.getresponse().read())["input_size"] == [SIDE, SIDE]
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=20)
        assert (process.returncode, json.loads(out)) == (0, {"stopped": True})
    finally:
        process.kill()
        process.communicate()


def test_ctrl_c_while_it_loads_shows_no_traceback(device: Device) -> None:
    program = "import kiridashi.line_program as p, sys; print('ready', flush=True); sys.exit(p.run(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "serve", "--line", "press-3", "--port", "0", "--state"]
    for wait_s in (0.0, 0.05, 0.1, 0.2):
        process = subprocess.Popen(
            [*command, str(device.state_dir)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(wait_s)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()
        assert "Traceback" not in said
        assert process.returncode in (-signal.SIGINT, 130, 0), said


def test_the_command_tells_what_a_line_has(device: Device, capsys: pytest.CaptureFixture[str]) -> None:
    from kiridashi.line_command import run

    assert run(["info", "--line", "press-3", "--state", str(device.state_dir), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["lines"]
    assert (row["line"], row["version"], row["provider"]) == ("press-3", 1, "cpu")
    code = run(["info", "--line", "press-3", "--state", str(device.state_dir), "--provider", "cuda"])
    assert (code, "none of the providers cuda" in capsys.readouterr().err) == (50, True)
    serve = ["serve", "--line", "press-3", "--state", str(device.state_dir)]
    assert run([*serve, "--max-frames", "0"]) == 10
    assert [run([*serve, "--timeout", seconds]) for seconds in ("nan", "inf", "0")] == [10] * 3
    assert [run([*serve, "--port", port]) for port in ("65536", "-1")] == [10] * 2
    assert run([*serve, "--host", "0.0.0.0"]) == 10
    assert "--allow-remote" in capsys.readouterr().err
