"""The spool: a bounded folder through which line processes hand frames to the people who name them, and to tuning.

``<state>/spool/<line>/`` belongs to the device alone: mode 0700, files 0600, and nothing in it is ever sent anywhere.

- ``frames/``: what the line's processes kept. Each file is one frame with what the model said of it.
- ``answered/``: frames that a person has been shown. The line cannot displace them.
- ``answers.jsonl``: what people said, append-only; an undo is a line of its own.
- ``aside/``: the newest files that could not be read.

Any number of processes write, without a lock: every file appears whole by a rename, and its name carries its rank, so
whoever adds one also removes the least useful. Nothing here imports numpy.
"""

from kiridashi.spool.answers import Answer, AnswerLog
from kiridashi.spool.entries import Frame, FrameHeader, Place
from kiridashi.spool.folder import SpoolFolder
from kiridashi.spool.limits import SpoolLimits
from kiridashi.spool.offer import Spool, SpoolCounts

__all__ = [
    "Answer",
    "AnswerLog",
    "Frame",
    "FrameHeader",
    "Place",
    "Spool",
    "SpoolCounts",
    "SpoolFolder",
    "SpoolLimits",
]
