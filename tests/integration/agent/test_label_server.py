"""The page's server over HTTP: who may ask, what is refused, and what every answer carries."""

from __future__ import annotations

import http.client
import io
import os
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import pytest
from kiridashi.artifacts import MANIFEST_NAME
from kiridashi.errors import StateError
from kiridashi.slots import LineSlots
from kiridashi.spool import AnswerLog, SpoolFolder
from kiridashi_agent.cli import main
from kiridashi_agent.cli.label import _shown_host
from kiridashi_agent.label.access import MAX_WRONG, Access
from kiridashi_agent.label.server import MAX_BODY_BYTES, MAX_CONNECTIONS, LabelServer
from kiridashi_agent.label.session import LabelGoal, LabelSession
from label_place import LINE, activate, fill
from PIL import Image
from tiny_bundle import LABELS, SIDE


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()


class Visitor:
    """A client that keeps cookies, as a browser does."""

    def __init__(self, server: LabelServer) -> None:
        self.port, self.cookies = server.server_port, {}

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if self.cookies:
            given["Cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        connection.request(method, path, body, given)
        reply = connection.getresponse()
        for cookie in reply.headers.get_all("Set-Cookie") or []:
            name, _, value = cookie.partition(";")[0].partition("=")
            self.cookies[name] = value
        done = Reply(reply.status, dict(reply.headers), reply.read())
        connection.close()
        return done

    def get(self, path: str = "/", **headers: str) -> Reply:
        return self.ask("GET", path, **headers)

    def post(self, path: str, fields: Mapping[str, str], **headers: str) -> Reply:
        headers = {"Content_Type": "application/x-www-form-urlencoded", **headers}
        return self.ask("POST", path, urlencode(fields).encode(), **headers)

    def form(self) -> dict[str, str]:
        """The hidden fields of the page that is shown."""
        html = self.get().text
        fields = re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', html)
        return dict(reversed(fields))


@pytest.fixture
def folder(tmp_path: Path) -> SpoolFolder:
    return fill(tmp_path / "state")


@pytest.fixture
def access() -> Access:
    return Access.to("127.0.0.1")


@pytest.fixture
def server(folder, access) -> Iterator[LabelServer]:
    session = LabelSession(folder, LabelGoal(LABELS, "sha256:model", per_class=3))
    server = LabelServer("127.0.0.1", 0, LINE, session, access)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def visitor(server) -> Visitor:
    return Visitor(server)


def answers(folder: SpoolFolder) -> list[tuple[str, str, str]]:
    return [(answer.kind, answer.label, answer.by) for answer in AnswerLog(folder.answers_path).answers()]


def test_a_frame_is_shown_named_and_taken_back(visitor, folder) -> None:
    form = visitor.form()
    picture = Image.open(io.BytesIO(visitor.get(f"/frame/{form['entry']}.png").body))
    assert picture.size == (SIDE, SIDE)
    said = visitor.post("/answer", {**form, "answer": "class:ok"})
    assert (said.status, said.headers["Location"]) == (303, "/")
    assert answers(folder) == [("class", "ok", "")]
    undo = visitor.form()
    assert undo["entry"] != form["entry"]
    assert visitor.post("/undo", undo).status == 303
    assert answers(folder) == []
    assert visitor.form()["entry"] == form["entry"]


def test_a_form_sent_twice_names_one_frame(visitor, folder) -> None:
    form = {**visitor.form(), "answer": "class:ok"}
    assert [visitor.post("/answer", form).status for _ in range(2)] == [303, 303]
    assert answers(folder) == [("class", "ok", "")]


def test_initials_are_kept_with_the_answer(visitor, folder) -> None:
    form = visitor.form()
    assert visitor.post("/who", {"secret": form["secret"], "by": "  K\u7530\x07abcdefgh "}).status == 303
    visitor.post("/answer", {**visitor.form(), "answer": "unsure"})
    assert answers(folder) == [("unsure", "", "K\u7530abcdef")]
    assert "K\u7530abcdef" in visitor.get("/who").text
    visitor.post("/who", {"secret": form["secret"], "by": "", "pick": ""})
    visitor.post("/answer", {**visitor.form(), "answer": "none"})
    assert answers(folder)[-1] == ("none", "", "")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "10.1.2.3", "localhost.evil.example", ""])
@pytest.mark.parametrize("path", ["/", "/label.css", "/who"])
def test_a_page_under_another_name_is_refused(visitor, host, path) -> None:
    assert visitor.get(path, Host=host).status == 421
    assert visitor.post("/answer", {}, Host=host).status == 421


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Content_Type": "text/plain"},
        {"Content_Type": "application/json"},
    ],
)
def test_what_another_page_sends_changes_nothing(visitor, folder, headers) -> None:
    form = {**visitor.form(), "answer": "class:ok"}
    assert visitor.post("/answer", form, **headers).status == 403
    assert visitor.post("/undo", form, **headers).status == 403
    assert answers(folder) == []


@pytest.mark.parametrize("secret", [None, "", "x", "\u7530"])
def test_a_form_without_the_secret_changes_nothing(visitor, folder, secret) -> None:
    form = {**visitor.form(), "answer": "class:ok"}
    form = {name: value for name, value in form.items() if name != "secret"}
    reply = visitor.post("/answer", form if secret is None else {**form, "secret": secret})
    assert reply.status == 403
    assert "earlier start" in reply.text
    assert answers(folder) == []


@pytest.mark.parametrize("answer", ["class:rust", "class:", "rust", "", "unsure:dent", "none:x", "class:ok\n"])
def test_an_answer_that_there_is_not_is_refused(visitor, folder, answer) -> None:
    assert visitor.post("/answer", {**visitor.form(), "answer": answer}).status == 400
    assert answers(folder) == []


def test_requests_are_small(visitor, server) -> None:
    form = {**visitor.form(), "answer": "x" * MAX_BODY_BYTES}
    assert visitor.post("/answer", form).status == 403
    assert visitor.ask("POST", "/answer", Content_Length="-5").status == 403
    assert visitor.get("/" + "x" * 70_000).status == 414
    assert visitor.get("/frame/../../../../etc/passwd.png").status == 404
    assert visitor.get("/frame/%2e%2e%2fanswers.jsonl.png").status == 404
    assert visitor.get("/label.html").status == 404
    assert visitor.ask("PUT", "/").status == 501


def test_connections_that_say_nothing_do_not_pile_up(server, visitor) -> None:
    before = threading.active_count()
    silent = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(3 * MAX_CONNECTIONS)]
    try:
        closed = sum(_is_closed(connection) for connection in silent)
        assert closed >= 2 * MAX_CONNECTIONS
        assert threading.active_count() <= before + MAX_CONNECTIONS
    finally:
        for connection in silent:
            connection.close()


def _is_closed(connection: socket.socket) -> bool:
    connection.settimeout(0.5)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True


def test_every_reply_carries_the_rules(visitor) -> None:
    entry = visitor.form()["entry"]
    for path in ("/", "/who", f"/frame/{entry}.png", "/label.css", "/label.js", "/nothing"):
        headers = visitor.get(path).headers
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
        assert "http" not in policy
        assert (headers["X-Content-Type-Options"], headers["Cache-Control"]) == ("nosniff", "no-store")
        assert "Access-Control-Allow-Origin" not in headers
        assert "Python" not in headers.get("Server", "")


def test_the_language_is_the_browsers_until_somebody_chooses(visitor) -> None:
    assert "What do you see?" in visitor.get().text
    assert "どれに見えますか" in visitor.get("/", Accept_Language="ja-JP,ja;q=0.9").text
    assert visitor.get("/?lang=ja").status == 303
    assert "どれに見えますか" in visitor.get("/", Accept_Language="en").text
    assert visitor.get("/?lang=xx").status == 200


def test_a_full_disk_is_said_and_the_frame_stays(visitor, folder, monkeypatch) -> None:
    form = visitor.form()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        reply = visitor.post("/answer", {**form, "answer": "class:ok"})
    assert reply.status == 507
    assert "disk is full" in reply.text
    assert answers(folder) == []
    assert visitor.form()["entry"] == form["entry"]


def test_the_page_follows_the_line_to_other_classes(folder, access) -> None:
    goals: list[LabelGoal | StateError] = [LabelGoal(LABELS, "one"), StateError("damaged"), LabelGoal(("bent",), "two")]

    def current_goal() -> LabelGoal:
        goal = goals.pop(0)
        if isinstance(goal, StateError):
            raise goal
        return goal

    session = LabelSession(folder, LabelGoal(LABELS, "one"))
    server = LabelServer("127.0.0.1", 0, LINE, session, access, current_goal)
    try:
        shown = [{choice.label for choice in (*view.guesses, *view.others)} for view in (server.view() for _ in "123")]
    finally:
        server.server_close()
    assert shown == [set(LABELS), set(LABELS), {"bent"}]


def test_answers_that_cannot_be_read_are_said(visitor, folder) -> None:
    folder.answers_path.mkdir()
    for path in ("/", "/who"):
        reply = visitor.get(path)
        assert reply.status == 500
        assert "cannot be read" in reply.text
        assert "disk is full" not in reply.text


def test_a_disk_too_full_to_claim_a_frame_is_said(visitor, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SpoolFolder, "claim", full)
    reply = visitor.get()
    assert reply.status == 507
    assert "disk is full" in reply.text


def test_a_slot_without_its_manifest_is_said(tmp_path, capsys) -> None:
    state = tmp_path / "device"
    activate(state)
    (LineSlots(state, LINE).folder("a") / MANIFEST_NAME).unlink()
    assert main(["label", "--line", LINE, "--state", str(state), "--port", "0"]) == 60
    assert "the classes of line 'press-3' cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bind", "names", "shown"),
    [
        ("127.0.0.1", [], "127.0.0.1"),
        ("::1", [], "[::1]"),
        ("0.0.0.0", [], "ADDRESS-OF-THIS-DEVICE"),
        ("::", ["panel-3.plant.example"], "panel-3.plant.example"),
    ],
)
def test_the_printed_address_can_be_opened(bind, names, shown) -> None:
    assert _shown_host(bind, names) == shown


def test_a_frame_that_is_gone_is_said(visitor, folder) -> None:
    form = visitor.form()
    (folder.answered / form["entry"]).unlink()
    reply = visitor.post("/answer", {**form, "answer": "class:ok"})
    assert (reply.status, "no longer there" in reply.text) == (409, True)
    assert visitor.get(f"/frame/{form['entry']}.png").status == 404


class TestForOtherHosts:
    @pytest.fixture
    def access(self) -> Access:
        return Access.to("0.0.0.0", ("panel.plant.example",))

    def test_nothing_is_shown_without_the_code(self, visitor, folder, access) -> None:
        entry = folder.scan(folder.frames)[0].name
        for path in ("/", "/who", f"/frame/{entry}.png"):
            reply = visitor.get(path)
            assert (reply.status, "This page is protected" in reply.text) == (403, True)
        reply = visitor.post("/answer", {"secret": access.form_secret, "entry": entry, "answer": "class:ok"})
        assert reply.status == 403
        assert folder.scan(folder.answered) == []
        assert access.code not in visitor.get("/").text

    def test_the_code_opens_it_for_this_visitor(self, visitor, server, access) -> None:
        secret = visitor.form()["secret"]
        assert visitor.post("/enter", {"secret": secret, "code": "wrong"}).status == 403
        done = visitor.post("/enter", {"secret": secret, "code": access.code})
        assert done.status == 303
        assert "HttpOnly" in done.headers["Set-Cookie"]
        assert "SameSite=Strict" in done.headers["Set-Cookie"]
        assert access.code not in done.headers["Set-Cookie"]
        assert visitor.get(Host="panel.plant.example").status == 200
        assert Visitor(server).get().status == 403

    def test_guessing_comes_to_an_end(self, visitor, access) -> None:
        secret = visitor.form()["secret"]
        for _ in range(MAX_WRONG):
            assert visitor.post("/enter", {"secret": secret, "code": "wrong"}).status == 403
        assert visitor.post("/enter", {"secret": secret, "code": access.code}).status == 429
