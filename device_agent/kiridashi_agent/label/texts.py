"""The page's words in both languages, and which language a browser wants."""

from __future__ import annotations

from typing import Literal

Language = Literal["en", "ja"]
LANGUAGES: dict[Language, str] = {"en": "English", "ja": "日本語"}

_EN = {
    "title": "{line}: name the frames",
    "question": "What do you see?",
    "picture": "The frame to name",
    "guess": "the model says",
    "missing": "{count} more",
    "enough": "enough",
    "unsure": "Not sure",
    "none": "None of these",
    "undo": "Undo",
    "said": "Saved: {answer}",
    "progress": "{named} of {wanted} named",
    "waiting": "{count} waiting",
    "who": "Initials",
    "who_question": "Who is naming?",
    "who_help": "Optional. Up to 8 letters; they are kept on this device with every answer.",
    "who_save": "Save",
    "who_nobody": "Without initials",
    "empty": "No frame is waiting",
    "empty_help": "The line keeps new frames while it runs. This page looks again by itself.",
    "done": "All classes have enough frames. Thank you! You may go on.",
    "damaged": "{count} unreadable files were set aside",
    "private": "Frames and answers stay on this device.",
    "keys": "Keys: 1 to 9 the classes, U not sure, N none, Z undo",
    "enter": "This page is protected",
    "enter_help": "Type the code that kiridashi-agent label has printed on the device.",
    "enter_code": "Code",
    "enter_go": "Open",
    "enter_wrong": "This code is not right.",
    "enter_wait": "Too many wrong codes. Wait a minute.",
    "error": "This did not work",
    "error_stale": "This page was from an earlier start of the program. Nothing was saved.",
    "error_gone": "This frame is no longer there. Nothing was saved.",
    "error_full": "The answer could not be saved: the disk is full or cannot be written. Call maintenance.",
    "error_read": "The frames or answers cannot be read. Call maintenance.",
    "error_refused": "The request was refused.",
    "back": "Go on",
    "language": "Language",
}
_JA = {
    "title": "{line}：画像の分類",
    "question": "どれに見えますか？",
    "picture": "分類する画像",
    "guess": "モデルの予想",
    "missing": "あと{count}枚",
    "enough": "十分です",
    "unsure": "わからない",
    "none": "どれでもない",
    "undo": "取り消す",
    "said": "保存しました：{answer}",
    "progress": "{wanted}枚中{named}枚完了",
    "waiting": "残り{count}枚",
    "who": "担当者",
    "who_question": "担当者を入力してください",
    "who_help": "省略できます。8文字まで。回答と一緒にこの装置だけに保存されます。",
    "who_save": "保存",
    "who_nobody": "入力しない",
    "empty": "分類する画像はありません",
    "empty_help": "ラインの運転中に新しい画像が集まります。この画面は自動で更新されます。",
    "done": "すべての分類で必要な枚数がそろいました。ありがとうございます。続けることもできます。",
    "damaged": "読めないファイルを{count}個よけました",
    "private": "画像と回答はこの装置の外に出ません。",
    "keys": "キー操作：1～9 分類、U わからない、N どれでもない、Z 取り消す",
    "enter": "この画面は保護されています",
    "enter_help": "装置で kiridashi-agent label が表示したコードを入力してください。",
    "enter_code": "コード",
    "enter_go": "開く",
    "enter_wrong": "コードが違います。",
    "enter_wait": "間違いが多すぎます。1分待ってください。",
    "error": "うまくいきませんでした",
    "error_stale": "この画面はプログラムの再起動前のものです。何も保存されていません。",
    "error_gone": "この画像はもうありません。何も保存されていません。",
    "error_full": "保存できませんでした。ディスクがいっぱいか、書き込めません。保全担当に連絡してください。",
    "error_read": "画像または回答を読み込めません。保全担当に連絡してください。",
    "error_refused": "この操作は受け付けられません。",
    "back": "続ける",
    "language": "言語",
}
TEXTS: dict[Language, dict[str, str]] = {"en": _EN, "ja": _JA}


def preferred_language(accept: str) -> Language:
    """The language that an ``Accept-Language`` header asks for (RFC 9110, section 12.5.4); English otherwise."""
    wishes: list[tuple[float, Language]] = []
    for piece in accept[:500].split(","):
        name, _, quality = piece.strip().partition(";")
        try:
            weight = float(quality.strip().removeprefix("q=")) if quality else 1.0
        except ValueError:
            continue
        for language in LANGUAGES:
            if weight > 0 and name.strip().lower().partition("-")[0] == language:
                wishes.append((weight, language))
    return max(wishes, key=lambda wish: wish[0])[1] if wishes else "en"
