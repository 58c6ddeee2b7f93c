"""``kiridashi-agent label`` as a process, used through a real browser: touch, keys, both languages, small panels."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from agent_program import wait_for
from installed import AGENT, environment, killed_at_the_end
from kiridashi.spool import AnswerLog, SpoolFolder
from label_place import LINE, activate, fill
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright
from tiny_bundle import LABELS

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECOND_TAPS = """
window.secondTaps = 0;
addEventListener("load", () => [1, 200].forEach(delay => setTimeout(() => {
  window.secondTaps += 1;
  document.querySelector("button.guess").click();
}, delay)));
"""  # of a finger that lingers: at fixed times after the next frame is shown, however slow the machine is
CODE = re.compile(r"code for other hosts: (\w+)\n")
GUARD_MS = 450  # a little longer than the page ignores touches after it has changed
PANEL = {"width": 800, "height": 480}
SCREENS = {"panel": PANEL, "upright": {"width": 480, "height": 800}, "desk": {"width": 1280, "height": 800}}
JAPANESE = ("打痕", "良品", "傷", "しみ", "汚れ・油分の付着", "バリ", "欠け", "変形", "異物", "塗装むら", "色むら")
# Of every element with text of its own: how its colour stands against the nearest background (WCAG 2.2, 1.4.3).
CONTRASTS = """() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = colour => colour.slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
  const ground = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = rgb(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll("body *")]
    .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) && e.checkVisibility())
    .map(e => {
      const [a, b] = [light(rgb(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
      return [e.textContent.trim(), (a + 0.05) / (b + 0.05)];
    });
}"""


class Served:
    """The page's process on a state folder."""

    def __init__(self, state: Path, *options: str) -> None:
        self.state, self.folder, self.log = state, SpoolFolder(state, LINE), state / "label.log"
        command = [str(AGENT), "label", "--line", LINE, "--port", "0", "--state", str(state), "--json", *options]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment())
        wait_for(lambda: "stop with Ctrl-C" in self.log.read_text() or self.process.poll() is not None, timeout_s=30)
        assert self.process.poll() is None, self.log.read_text()
        self.url = re.search(r"http://\S+", self.log.read_text())[0].replace("0.0.0.0", "127.0.0.1")

    def answers(self) -> list[tuple[str, str, str]]:
        return [(answer.kind, answer.label, answer.by) for answer in AnswerLog(self.folder.answers_path).answers()]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.fail("the page is tested in Chromium, which is not installed: apt-get install chromium (make setup-dev)")
    rules = "--host-resolver-rules=MAP rebound.example 127.0.0.1"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", rules])
        yield browser
        browser.close()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def served(state: Path) -> Iterator[Served]:
    activate(state)
    fill(state)
    served = Served(state, "--per-class", "3")
    with killed_at_the_end(served.process):
        yield served


class Watched:
    """A page of a browser, with everything that went wrong in it and every address that it asked."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.page: Page = context.new_page()
        self.problems: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)

    def entry(self) -> str:
        return self.page.locator("input[name=entry]").get_attribute("value")

    def after_guard(self) -> Page:
        self.page.wait_for_timeout(GUARD_MS)
        return self.page

    def press(self, key: str) -> None:
        """Press a key and wait for the page that follows."""
        with self.after_guard().expect_navigation():
            self.page.keyboard.press(key)

    def tap(self, selector: str) -> None:
        with self.after_guard().expect_navigation():
            self.page.locator(selector).first.tap()


def opened(browser: Browser, url: str, screen: str = "panel", language: str = "en-GB") -> Watched:
    context = browser.new_context(viewport=SCREENS[screen], locale=language, has_touch=screen != "desk")
    return Watched(context, url)


def test_a_worker_names_frames_by_touch(browser, served) -> None:
    watched = opened(browser, served.url)
    page = watched.page
    first = watched.entry()
    best = page.locator("button.guess .name").first.inner_text()
    assert page.locator("button.guess").count() == 3
    image = page.locator("figure img")
    assert image.evaluate("e => [e.naturalWidth, getComputedStyle(e).imageRendering]") == [16, "pixelated"]
    watched.tap("button.guess")
    assert served.answers() == [("class", best, "")]
    assert watched.entry() != first
    assert f"Saved: {best}" in page.locator(".undo").inner_text()
    assert page.locator(".progress").inner_text().split("\n")[0] == "1 of 12 named"
    watched.tap("button[value=unsure]")
    watched.tap("button[value=none]")
    watched.tap(f'button[value="class:{LABELS[3]}"]')
    assert [kind for kind, _, _ in served.answers()] == ["class", "unsure", "none", "class"]
    watched.tap(".undo button")
    assert [kind for kind, _, _ in served.answers()] == ["class", "unsure", "none"]
    assert watched.problems == []
    assert {url[: len(served.url)] for url in watched.asked if not url.startswith("data:")} == {served.url}


def test_a_worker_names_frames_by_keys(browser, served) -> None:
    watched = opened(browser, served.url, "desk")
    labels = watched.page.locator("button[value^=class] .name").all_inner_texts()
    assert sorted(labels) == sorted(LABELS)
    watched.press("4")
    watched.press("u")
    watched.press("N")
    assert served.answers() == [("class", labels[3], ""), ("unsure", "", ""), ("none", "", "")]
    watched.press("Backspace")
    watched.press("z")
    assert served.answers() == [("class", labels[3], "")]
    watched.after_guard().keyboard.press("9")  # there is no ninth class
    watched.page.keyboard.press("Control+1")
    watched.page.wait_for_timeout(300)
    assert len(served.answers()) == 1
    watched.page.keyboard.press("Tab")
    assert watched.page.evaluate("document.activeElement.tagName") == "A"
    assert watched.problems == []


def test_a_second_tap_is_not_an_answer_for_the_next_frame(browser, served) -> None:
    watched = opened(browser, served.url)
    watched.page.add_init_script(SECOND_TAPS)
    watched.tap("button.guess")
    watched.page.wait_for_timeout(900)
    assert watched.page.evaluate("window.secondTaps") == 2
    assert len(served.answers()) == 1


def test_a_tap_meant_for_the_frame_before_does_not_count(browser, served) -> None:
    context = browser.new_context(viewport=PANEL)
    early = "addEventListener('load', () => setTimeout(() => document.querySelector('button.guess').click(), 0))"
    context.add_init_script(early)
    watched = Watched(context, served.url)
    watched.page.wait_for_timeout(600)
    assert served.answers() == []
    watched.press("1")
    watched.page.wait_for_timeout(600)
    assert len(served.answers()) == 1


def test_it_speaks_both_languages(browser, served) -> None:
    watched = opened(browser, served.url, language="ja-JP")
    page = watched.page
    assert page.locator("h2").inner_text() == "どれに見えますか？"
    assert page.locator("html").get_attribute("lang") == "ja"
    page.locator("nav a[lang=en]").tap()
    assert page.locator("h2").inner_text() == "What do you see?"
    page.reload()
    assert page.locator("html").get_attribute("lang") == "en"
    assert opened(browser, served.url, language="fr-FR").page.locator("h2").inner_text() == "What do you see?"


def test_initials_are_typed_once(browser, served) -> None:
    watched = opened(browser, served.url)
    page = watched.page
    page.locator("a.who").tap()
    page.locator("#by").fill("田中1")  # a digit that is typed is not an answer
    page.keyboard.press("Enter")
    page.wait_for_selector("figure")
    assert page.locator("a.who b").inner_text() == "田中1"
    watched.press("1")
    assert served.answers()[0][2] == "田中1"
    other = opened(browser, served.url)
    other.page.locator("a.who").tap()
    other.page.locator("button[name=pick]").first.tap()
    assert other.page.locator("a.who b").inner_text() == "田中1"


def test_all_frames_named_it_says_so_and_waits_for_more(browser, served) -> None:
    watched = opened(browser, served.url, "desk")
    for _ in range(20):
        watched.press("1")
    page = watched.page
    assert page.locator("h1").last.inner_text() == "No frame is waiting"
    assert page.locator("meta[http-equiv=refresh]").count() == 1
    assert len(served.answers()) == 20
    served.process.send_signal(signal.SIGTERM)
    out, _ = served.process.communicate(timeout=20)
    assert served.process.returncode == 0
    counts = json.loads(out)
    assert (sum(counts["named"].values()), counts["waiting"], counts["damaged"]) == (20, 0, 0)


def test_killed_in_the_middle_it_has_lost_no_answer(browser, served, state) -> None:
    watched = opened(browser, served.url, "desk")
    for _ in range(3):
        watched.press("1")
    shown = watched.entry()
    served.process.kill()
    served.process.wait()
    again = Served(state, "--per-class", "3")
    with killed_at_the_end(again.process):
        assert len(again.answers()) == 3
        after = opened(browser, again.url, "desk")
        assert after.entry() == shown
        after.press("z")
        assert len(again.answers()) == 2


def test_a_rebound_name_and_other_pages_get_nothing(browser, served) -> None:
    port = served.url.rstrip("/").rpartition(":")[2]
    page = browser.new_context().new_page()
    reply = page.goto(f"http://rebound.example:{port}/")
    assert reply.status == 421
    assert page.locator("figure").count() == 0
    page.goto("data:text/html,<p>elsewhere")
    page.evaluate(
        "url => fetch(url + 'answer', {method: 'POST', mode: 'no-cors', headers: "
        "{'Content-Type': 'application/x-www-form-urlencoded'}, body: 'answer=class:ok'}).catch(() => 0)",
        served.url,
    )
    frame = page.evaluate(
        "url => new Promise(done => { const f = document.createElement('iframe'); f.onload = () => done(f.src);"
        "f.src = url; document.body.append(f); })",
        served.url,
    )
    assert frame == served.url
    assert page.frames[1].locator("figure").count() == 0  # the page does not let itself be framed
    assert served.answers() == []


def test_other_hosts_need_the_code(browser, state) -> None:
    activate(state)
    fill(state)
    served = Served(state, "--bind", "0.0.0.0")
    with killed_at_the_end(served.process):
        wait_for(lambda: CODE.search(served.log.read_text()) is not None, timeout_s=30)
        code = CODE.search(served.log.read_text())[1]
        assert "ADDRESS-OF-THIS-DEVICE" in served.url
        watched = opened(browser, served.url.replace("ADDRESS-OF-THIS-DEVICE", "127.0.0.1"))
        page = watched.page
        assert page.locator("figure").count() == 0
        page.locator("#code").fill(code)
        page.locator("button.go").tap()
        page.wait_for_selector("figure")
        watched.press("1")
        assert len(served.answers()) == 1


def fits(page: Page) -> None:
    """Large targets, readable colours, and nothing that a finger cannot reach."""
    small = page.evaluate(
        "() => [...document.querySelectorAll('button, a, input:not([type=hidden])')].filter(e => e.checkVisibility())"
        ".map(e => [e.textContent, e.getBoundingClientRect()]).filter(([, b]) => b.height < 48 || b.width < 48)"
        ".map(([text]) => text)"
    )
    assert small == []
    weak = [(text, ratio) for text, ratio in page.evaluate(CONTRASTS) if ratio < 4.5]
    assert weak == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    outside = page.evaluate(
        "() => [...document.querySelectorAll('.outs button, .undo button, .guess, figure')]"
        ".map(e => [e.textContent, e.getBoundingClientRect()])"
        ".filter(([, b]) => b.bottom > innerHeight || b.right > innerWidth || b.height < 20).map(([text]) => text)"
    )
    assert outside == []


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("language", ["ja-JP", "en-GB"])
@pytest.mark.parametrize("labels", [LABELS, JAPANESE], ids=["few", "many"])
def test_it_fits_every_screen(browser, state, screen: str, language: str, labels: Sequence[str]) -> None:
    activate(state, labels)
    fill(state, 2, labels)
    served = Served(state)
    with killed_at_the_end(served.process):
        watched = opened(browser, served.url, screen, language)
        watched.press("1")
        fits(watched.page)
        last = watched.page.locator("button[value^=class]").last
        last.scroll_into_view_if_needed()
        assert last.evaluate("e => e.getBoundingClientRect().bottom <= innerHeight")
        watched.page.goto(served.url + "who")
        fits(watched.page)
        assert watched.problems == []
