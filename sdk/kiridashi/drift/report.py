"""What is told of the watch: on the wire, in the journal, in the commands. No numpy."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Signal = Literal["image", "outputs", "classes"]
ReferenceName = Literal["line", "server"]
Phase = Literal["learning", "watching"]
MAX_FINDINGS = 6
MAX_EXAMPLES = 8


class Finding(msgspec.Struct, frozen=True):
    """A change that was found, with its evidence. There is at most one for each reference and signal.

    Attributes:
        reference: "line": changed since the model became active. "server": unlike the samples it was made on.
        signal: what changed: the image, the model's outputs, or how often it says which class.
        statistic, change: which number or class, and how.
        p_value: at most this probable for any of the tests, ever, had nothing changed.
        limit: the event's share was bounded by this,
        share: and is this since ``since_s``.
        before, now: the statistic's median, or the class's share, in the reference and since.
        frames: sampled frames, thinned, from the probable moment of change to the alarm.
        tested: sampled frames, thinned, up to the alarm.
        since_s, at_s: the probable moment and that of the alarm, by the device's clock, which may be wrong.
        examples: frames of the spool that are asked to be named, by file name.
    """

    reference: ReferenceName
    signal: Signal
    statistic: str
    change: str
    p_value: float
    limit: float
    share: float
    before: float
    now: float
    frames: int
    tested: int
    since_s: float
    at_s: float
    examples: Annotated[tuple[str, ...], msgspec.Meta(max_length=MAX_EXAMPLES)] = ()

    @property
    def text(self) -> str:
        """One line for people."""
        if self.reference == "line":
            against = f"since the model became active, {self.before:.3g} then, {self.now:.3g} now"
        else:
            against = f"than the server's samples, {self.before:.3g} there, {self.now:.3g} here"
        return (
            f"{self.signal}: {self.statistic} {self.change} {against}; "
            f"{self.share:.0%} of {self.frames} frames where at most {self.limit:.0%} were to be expected, "
            f"p {self.p_value:.1g}"
        )


class LineDrift(msgspec.Struct, frozen=True):
    """The watch over one line.

    Attributes:
        phase: "learning" what the line looks like, or "watching".
        model_digest: the model that was active.
        learnt, wanted: frames of the line's own reference, thinned, and how many it takes.
        stride: one of so many sampled frames is used; 0 while it is not known.
        sampled: frames that were sampled, all in all.
        findings: what was found.
    """

    phase: Phase
    model_digest: str
    learnt: int
    wanted: int
    stride: int
    sampled: int
    findings: Annotated[tuple[Finding, ...], msgspec.Meta(max_length=MAX_FINDINGS)] = ()
