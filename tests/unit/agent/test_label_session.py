"""What the page shows next, and what an answer does."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from kiridashi.errors import InputError, StateError
from kiridashi.spool import Answer, Place, SpoolFolder
from kiridashi_agent.label.access import MAX_WRONG, WRONG_WINDOW_S, Access
from kiridashi_agent.label.page import Visit, enter_page, error_page, naming_page, who_page
from kiridashi_agent.label.png import encode_png
from kiridashi_agent.label.session import ClassChoice, LabelGoal, LabelSession, View, to_forget
from kiridashi_agent.label.summary import NamedFrames, named_frames
from kiridashi_agent.label.texts import TEXTS, preferred_language
from label_place import add_frame
from PIL import Image
from tiny_bundle import LABELS

SURE, UNSURE = (0.97, 0.01, 0.01, 0.01), (0.3, 0.28, 0.22, 0.2)


@pytest.fixture
def folder(tmp_path: Path) -> SpoolFolder:
    return SpoolFolder(tmp_path, "press-3")


@pytest.fixture
def session(folder: SpoolFolder) -> LabelSession:
    return LabelSession(folder, LabelGoal(LABELS, "sha256:model", per_class=2))


def say(session: LabelSession, entry: str, label: str = "dent", at_s: float = 1.0) -> None:
    session.answer(entry, "class" if label else "unsure", label, "KT", at_s)


def test_the_least_sure_frame_comes_first_and_is_claimed(folder, session) -> None:
    add_frame(folder, SURE)
    unsure = add_frame(folder, UNSURE)
    view = session.view()
    assert view.entry == unsure
    assert [choice.label for choice in view.guesses] == ["dent", "ok", "scratch"]
    assert [choice.label for choice in view.others] == ["stain"]
    assert (view.named, view.wanted, view.waiting) == (0, 8, 2)
    assert [place.name for place in folder.scan(folder.answered)] == [unsure]
    assert session.view().entry == unsure  # until somebody answers


def test_a_frame_of_a_class_that_is_still_wanted_comes_before_a_less_sure_one(folder, session) -> None:
    for _ in range(2):
        add_frame(folder, UNSURE)
        say(session, session.view().entry)
    add_frame(folder, (0.4, 0.35, 0.15, 0.1))
    wanted = add_frame(folder, (0.1, 0.5, 0.3, 0.1))
    assert session.view().entry == wanted


def test_every_fourth_frame_is_of_the_random_draw(folder, session) -> None:
    drawn = add_frame(folder, SURE, kind="random")
    for _ in range(5):
        add_frame(folder, UNSURE)
    shown = []
    for _ in range(4):
        shown.append(session.view().entry)
        say(session, shown[-1], "")
    assert shown[3] == drawn
    assert drawn not in shown[:3]


def test_what_is_named_of_the_random_draw_does_not_depend_on_the_values(folder, session) -> None:
    """In whatever turn they are shown: by rank, as they were drawn."""
    rng = np.random.default_rng(0)
    drawn = []
    for rank in range(12):
        values = sorted((float(v) for v in rng.dirichlet(np.full(4, 0.3))), reverse=True)
        drawn.append(add_frame(folder, values, kind="random", rank=float(rank)))
    uncertain = [add_frame(folder, SURE) for _ in range(6)]
    shown = []
    for _ in range(18):
        shown.append(session.view().entry)
        say(session, shown[-1], "")
    assert [entry for entry in shown if entry in drawn] == drawn[::-1]
    assert [number for number, entry in enumerate(shown) if entry in uncertain] == [0, 1, 2, 4, 5, 6]


def test_undo_shows_the_frame_again_and_counts_back(folder, session) -> None:
    for _ in range(3):
        add_frame(folder, UNSURE)
    first = session.view().entry
    say(session, first, "ok")
    view = session.view()
    assert view.entry != first
    assert (view.named, view.last.label, view.last.by) == (1, "ok", "KT")
    session.undo(view.last.id, "KT", 2.0)
    again = session.view()
    assert (again.entry, again.named, again.last) == (first, 0, None)
    session.undo(view.last.id, "KT", 3.0)
    assert session.view().entry == first


def test_unsure_and_none_are_kept_and_count_for_no_class(folder, session) -> None:
    for kind in ("unsure", "none"):
        add_frame(folder, UNSURE)
        session.answer(session.view().entry, kind, "", "", 1.0)
    view = session.view()
    assert (view.entry, view.named, view.waiting) == ("", 0, 0)
    assert named_frames(folder) == NamedFrames(unsure=1, none=1)


def test_what_cannot_be_meant_is_refused(folder, session) -> None:
    entry = add_frame(folder, UNSURE)
    with pytest.raises(StateError, match="no longer"):
        say(session, entry)  # it was never shown
    shown = session.view().entry
    for kind, label in (("class", "rust"), ("class", ""), ("unsure", "dent")):
        with pytest.raises(InputError):
            session.answer(shown, kind, label, "", 1.0)
    for name in ("../answers.jsonl", "", "x.frame"):
        with pytest.raises(StateError):
            say(session, name)
        assert session.frame(name) is None


def test_damaged_frames_are_passed_over_and_counted(folder, session) -> None:
    bad, good = add_frame(folder, UNSURE), add_frame(folder, SURE)
    path = folder.frames / bad
    path.write_bytes(path.read_bytes()[:-3])
    view = session.view()
    assert (view.entry, view.damaged) == (good, 1)
    assert "1 unreadable" in str(named_frames(folder))


def test_values_without_names_count_only_for_the_active_model(folder, session) -> None:
    add_frame(folder, UNSURE, labels=())
    assert [choice.value for choice in session.view().guesses] == [0.3, 0.28, 0.22]
    say(session, session.view().entry)
    add_frame(folder, UNSURE, labels=(), digest="sha256:older")
    assert session.view().guesses == ()


def test_classes_of_another_model_are_guessed_by_name(folder, session) -> None:
    add_frame(folder, (0.2, 0.5, 0.3), labels=("rust", "stain", "ok"))
    assert [choice.label for choice in session.view().guesses] == ["stain", "ok"]


def test_answers_outlive_the_program(folder, session) -> None:
    for _ in range(2):
        add_frame(folder, UNSURE)
    say(session, session.view().entry)
    pending = session.view().entry
    view = LabelSession(folder, LabelGoal(LABELS, "sha256:model", 2)).view()
    assert (view.entry, view.named) == (pending, 1)
    assert session.people() == ["KT"]


def test_answered_frames_are_bounded(folder) -> None:
    session = LabelSession(folder, LabelGoal(LABELS, "sha256:model", max_frames=3))
    for number in range(6):
        add_frame(folder, UNSURE)
        say(session, session.view().entry, "dent" if number % 2 else "ok", at_s=float(number))
    assert len(folder.scan(folder.answered)) == 3
    assert session.view().named == 3


def test_frames_without_a_class_leave_first_then_those_of_the_largest_class() -> None:
    places = [Place(name, "uncertain", 0.0, 0.0, 10) for name in "abcde"]
    said = [
        ("a", "class", "ok"),
        ("b", "class", "dent"),
        ("c", "class", "dent"),
        ("d", "none", ""),
        ("e", "unsure", ""),
    ]
    answers = [Answer(name, name, kind, float(n), label) for n, (name, kind, label) in enumerate(said)]
    goal = LabelGoal(LABELS, "", max_frames=2, max_bytes=10**6)
    assert [place.name for place in to_forget(places, answers, 10, goal)] == ["d", "e", "b", "a"]
    goal = LabelGoal(LABELS, "", max_frames=99, max_bytes=45)
    assert [place.name for place in to_forget(places, answers, 10, goal)] == ["d", "e"]
    assert to_forget(places, [], 10, goal) == []  # what nobody has answered is not thrown away


def test_a_png_is_what_was_kept() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    seen = Image.open(io.BytesIO(encode_png(pixels.tobytes(), 5, 7)))
    assert np.array_equal(np.asarray(seen), pixels)


def test_both_languages_say_the_same_things_of_the_same_values() -> None:
    fields = {name: {key: set(re.findall(r"{(\w+)}", text)) for key, text in TEXTS[name].items()} for name in TEXTS}
    assert fields["en"] == fields["ja"]


@pytest.mark.parametrize(
    ("accept", "language"),
    [
        ("", "en"),
        ("ja", "ja"),
        ("ja-JP,ja;q=0.9,en-US;q=0.8", "ja"),
        ("en-GB,en;q=0.9,ja;q=0.1", "en"),
        ("de,ja;q=0.5,en;q=0.3", "ja"),
        ("fr", "en"),
        ("ja;q=x,en", "en"),
        ("ja;q=0", "en"),
    ],
)
def test_the_browser_says_the_language(accept: str, language: str) -> None:
    assert preferred_language(accept) == language


class Tags(HTMLParser):
    """Every element of a page with its attributes' names."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[str, ...]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, tuple(name for name, _ in attrs)))


@pytest.mark.parametrize("evil", ['"><script>alert(1)</script>', "' onclick=x ", "</title><img src=x>", "&lt;"])
def test_no_word_from_outside_becomes_part_of_the_page(evil: str) -> None:
    def pages(word: str) -> list[str]:
        visit = Visit(word, "en", word, "secret")
        choice, last = ClassChoice(word, 0.5, 1), Answer(word, "e", "class", 0.0, word, word)
        view = View("x", 1, 1, (choice,), (choice,), 0, 2, 1, last, 1)
        return [naming_page(visit, view), who_page(visit, [word]), enter_page(visit), error_page(visit, "error_full")]

    for html, plain in zip(pages(evil), pages("plain"), strict=True):
        assert Tags(html).seen == Tags(plain).seen


def test_hosts_are_addresses_or_names_that_were_given() -> None:
    local, plant = Access.to("127.0.0.1"), Access.to("0.0.0.0", ("Panel.plant.example",))
    assert all(local.knows_host(host) for host in ("127.0.0.1:8770", "localhost:1", "LOCALHOST", "[::1]:8770"))
    assert not any(local.knows_host(host) for host in ("evil.example", "10.0.0.5", "", "localhost.evil.example"))
    assert all(plant.knows_host(host) for host in ("10.0.0.5:8770", "panel.plant.example", "[fe80::1]:1"))
    assert not plant.knows_host("evil.example")
    assert (local.code, len(plant.code)) == ("", 10)
    assert local.is_entered("")
    assert not plant.is_entered("")


def test_a_code_cannot_be_guessed_for_long() -> None:
    access = Access.to("0.0.0.0")
    for number in range(MAX_WRONG):
        assert not access.is_waiting(float(number))
        assert not access.try_code("wrong", float(number))
    assert access.is_waiting(MAX_WRONG + 1.0)
    assert not access.is_waiting(WRONG_WINDOW_S + 1.0)
    assert access.try_code(f" {access.code.upper()} ", 99.0)
