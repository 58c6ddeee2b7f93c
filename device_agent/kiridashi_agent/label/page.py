"""The pages as HTML. Every word that comes from outside is escaped; there is no inline script and no inline style."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from kiridashi_agent.label.session import ClassChoice, View
from kiridashi_agent.label.texts import LANGUAGES, TEXTS, Language

MAX_INITIALS = 8
REFRESH_S = 15
CRISP_SIDE = 400
FEW_CLASSES = 6
_KEYS = "123456789"


@dataclass(frozen=True)
class Visit:
    """Who looks: the language, their initials, and the secret that makes their forms believable."""

    line: str
    language: Language
    by: str
    form_secret: str

    def text(self, key: str, **values: object) -> str:
        """A sentence in the visitor's language, escaped."""
        return escape(TEXTS[self.language][key].format(**values))


def naming_page(visit: Visit, view: View) -> str:
    """The page with one frame, or with the news that none is waiting."""
    body = _frame(visit, view) if view.entry else _empty(visit, view)
    notes = [f"<span>{visit.text('private')}</span>"]
    if view.entry:
        notes.append(f'<span class="keys">{visit.text("keys")}</span>')
    if view.damaged:
        notes.append(f"<strong>{visit.text('damaged', count=view.damaged)}</strong>")
    footer = f"<footer>{''.join(notes)}</footer>"
    return _page(visit, _header(visit, view) + body + footer, refresh=not view.entry)


def who_page(visit: Visit, people: Sequence[str]) -> str:
    """The page on which somebody says who they are; earlier initials are buttons, for panels without a keyboard."""
    t = visit.text
    known = "".join(
        f'<button class="answer" name="pick" value="{escape(name)}"><span class="name">{escape(name)}</span></button>'
        for name in people[:MAX_INITIALS]
    )
    form = (
        f'<main class="card"><h1>{t("who_question")}</h1><form method="post" action="/who">{_secret(visit)}'
        f'<label for="by">{t("who")}</label><div class="row">'
        f'<input id="by" name="by" maxlength="{MAX_INITIALS}" value="{escape(visit.by)}" autocomplete="off">'
        f'<button class="go">{t("who_save")}</button></div><p>{t("who_help")}</p>'
        f'<div class="known">{known}<button class="answer other" name="pick" value="">{t("who_nobody")}</button></div>'
        "</form></main>"
    )
    return _page(visit, form)


def enter_page(visit: Visit, problem: str = "") -> str:
    """The page that asks for the code; ``problem`` is the key of a sentence."""
    t = visit.text
    alert = f'<p class="alert" role="alert">{t(problem)}</p>' if problem else ""
    form = (
        f'<main class="card"><h1>{t("enter")}</h1><p>{t("enter_help")}</p>{alert}'
        f'<form method="post" action="/enter">{_secret(visit)}<label for="code">{t("enter_code")}</label>'
        '<div class="row"><input id="code" name="code" maxlength="32" autocomplete="off" autocapitalize="none" '
        f'spellcheck="false" required><button class="go">{t("enter_go")}</button></div></form></main>'
    )
    return _page(visit, form)


def error_page(visit: Visit, key: str) -> str:
    """What went wrong, and a way on."""
    t = visit.text
    return _page(
        visit,
        f'<main class="card" role="alert"><h1>{t("error")}</h1><p>{t(key)}</p><p><a class="go" href="/">{t("back")}'
        "</a></p></main>",
    )


def _header(visit: Visit, view: View) -> str:
    t = visit.text
    progress = t("progress", named=view.named, wanted=view.wanted)
    languages = "".join(
        f'<a href="/?lang={code}" lang="{code}"{" aria-current=true" if code == visit.language else ""}>{name}</a>'
        for code, name in LANGUAGES.items()
    )
    return (
        f'<header><h1>{escape(visit.line)}</h1><div class="progress"><progress value="{view.named}" '
        f'max="{max(1, view.wanted)}" aria-label="{progress}"></progress><span>{progress}</span>'
        f'<span class="waiting">{t("waiting", count=view.waiting)}</span></div>'
        f'<a class="who" href="/who">{t("who")}<b>{escape(visit.by) or "–"}</b></a>'
        f'<nav aria-label="{t("language")}">{languages}</nav></header>'
    )


def _frame(visit: Visit, view: View) -> str:
    t = visit.text
    choices = [(choice, True) for choice in view.guesses] + [(choice, False) for choice in view.others]
    keys = [*_KEYS, *[""] * len(choices)]
    buttons = [_choice(visit, choice, key, is_guess=guess) for (choice, guess), key in zip(choices, keys, strict=False)]
    guesses, others = "".join(buttons[: len(view.guesses)]), "".join(buttons[len(view.guesses) :])
    done = f'<p class="done" role="status">{t("done")}</p>' if view.named >= view.wanted else ""
    many = " many" if len(choices) > FEW_CLASSES else ""
    crisp = ' class="crisp"' if max(view.height, view.width) <= CRISP_SIDE else ""  # larger ones are shrunk, not grown
    return (
        f'<main class="naming"><div class="look"><figure><img{crisp} src="/frame/{escape(view.entry)}.png" '
        f'width="{view.width}" height="{view.height}" alt="{t("picture")}"></figure>{_undo(visit, view)}</div>'
        f'<form class="answers{many}" method="post" action="/answer">{_secret(visit)}'
        f'<input type="hidden" name="entry" value="{escape(view.entry)}"><h2>{t("question")}</h2>{done}'
        f'<div class="scroll">{f"""<div class="guesses">{guesses}</div>""" if guesses else ""}'
        f'<div class="others">{others}</div></div><div class="outs">'
        f'<button class="answer other" name="answer" value="unsure" data-key="u"><kbd>U</kbd>'
        f'<span class="name">{t("unsure")}</span></button>'
        f'<button class="answer other" name="answer" value="none" data-key="n"><kbd>N</kbd>'
        f'<span class="name">{t("none")}</span></button></div></form></main>'
    )


def _choice(visit: Visit, choice: ClassChoice, key: str, *, is_guess: bool) -> str:
    percent = round(100 * choice.value)
    need = visit.text("missing", count=choice.missing) if choice.missing else visit.text("enough")
    told = ""
    if is_guess:
        told = (
            f'<span class="told"><meter value="{percent}" max="100" aria-hidden="true"></meter>'
            f"<small><span>{visit.text('guess')}</span> {percent} %</small></span>"
        )
    mark = f"<kbd>{key}</kbd>" if key else ""
    return (
        f'<button class="answer{" guess" if is_guess else ""}" name="answer" value="class:{escape(choice.label)}" '
        f'data-key="{key}">{mark}<span class="name">{escape(choice.label)}</span>{told}'
        f'<small class="need{"" if choice.missing else " enough"}">{need}</small></button>'
    )


def _undo(visit: Visit, view: View) -> str:
    """What was said last, with the way back."""
    last = view.last
    if last is None:
        return '<div class="undo"></div>'
    answer = last.label if last.kind == "class" else TEXTS[visit.language][last.kind]
    return (
        f'<form class="undo" method="post" action="/undo">{_secret(visit)}'
        f'<input type="hidden" name="id" value="{escape(last.id)}"><p role="status">{visit.text("said", answer=answer)}'
        f'</p><button class="answer other" data-key="z"><kbd>Z</kbd>'
        f'<span class="name">{visit.text("undo")}</span></button></form>'
    )


def _empty(visit: Visit, view: View) -> str:
    t = visit.text
    done = f'<p class="done" role="status">{t("done")}</p>' if view.named >= view.wanted else ""
    return f'<main class="card"><h1>{t("empty")}</h1>{done}<p>{t("empty_help")}</p>{_undo(visit, view)}</main>'


def _secret(visit: Visit) -> str:
    return f'<input type="hidden" name="secret" value="{visit.form_secret}">'


def _page(visit: Visit, body: str, *, refresh: bool = False) -> str:
    again = f'<meta http-equiv="refresh" content="{REFRESH_S}">' if refresh else ""
    return (
        f'<!doctype html><html lang="{visit.language}"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">{again}'
        f"<title>{visit.text('title', line=visit.line)}</title>"
        '<link rel="icon" href="data:,"><link rel="stylesheet" href="/label.css">'
        f'<script src="/label.js" defer></script></head><body>{body}</body></html>'
    )
