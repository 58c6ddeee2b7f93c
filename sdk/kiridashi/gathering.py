"""What a tuning learns from and is judged by: sample files, frames that people named, and samples kept from earlier.

A frame is learnt from or held out, and the hold-out is for good: what was held out once is never learnt from again,
whatever comes later and in whatever file. Where nobody says which samples are the hold-out, a quarter of every class is
held out (at least one, if the class has two): those that were before, then those whose content hashes come first, so
the choice does not depend on names or order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from kiridashi.errors import InputError
from kiridashi.kept import MAX_FRAME_BYTES, KeptFrame, KeptSamples, choose_kept, frame_key
from kiridashi.preprocess import resize
from kiridashi.samples import Samples, read_samples
from kiridashi.spool import AnswerLog, SpoolFolder
from kiridashi.spool.entries import parse_name

Source = Literal["files", "given", "named", "kept"]
HOLDOUT_SHARE = 0.25


@dataclass(frozen=True)
class Sources:
    """Where to look.

    ``folder`` has the line's own sample files, ``given`` are files and folders for this once, ``spool`` has the frames
    that people named, and ``kept`` the samples of earlier tunings.
    """

    folder: Path | None = None
    given: tuple[Path, ...] = ()
    spool: SpoolFolder | None = None
    kept: KeptSamples | None = None


@dataclass(frozen=True, eq=False)
class _Found:
    """One frame: its size is the model's, ``asked`` is the part that its file asks for, ``copy`` what may be kept."""

    key: str
    image: NDArray[np.uint8]
    label: int
    source: Source
    asked: bool | None = None
    copy: tuple[KeptFrame, bytes] | None = None


@dataclass(frozen=True, eq=False)
class Gathered:
    """Samples with where each came from, and what is to be kept of them."""

    samples: Samples
    sources: tuple[Source, ...]
    kept: KeptSamples | None
    copies: tuple[tuple[KeptFrame, bytes], ...]
    parts: Mapping[str, bool]

    def counts(self) -> dict[str, int]:
        """Samples by where they came from."""
        return dict(sorted(Counter(self.sources).items()))

    def keep(self) -> Gathered:
        """Keep copies for the next tuning, and remember every frame's part. Do it before anything is learnt.

        Returns this without the copies, whose memory is needed for tuning.

        Raises:
            StateError: they cannot be written.
        """
        if self.kept is not None:
            self.kept.write(choose_kept(self.copies), self.parts)
        return replace(self, copies=())

    def shortage(self, labels: Sequence[str]) -> str:
        """Why these samples are too few to learn from and to judge by, or an empty string.

        Every class is needed in both: training pushes the score of absent classes down, and what the hold-out lacks
        would be lost unseen.
        """
        for holdout, what in ((False, "sample to learn from"), (True, "hold-out sample")):
            present = set(self.samples.part(holdout=holdout).labels.tolist())
            absent = [name for n, name in enumerate(labels) if n not in present]
            if absent:
                return f"no {what} of class '{absent[0]}'" + (f" and {len(absent) - 1} more" if absent[1:] else "")
        return ""


def gather(sources: Sources, labels: Sequence[str], height: int, width: int) -> Gathered:
    """Read everything, decide every frame's part, and resize.

    A frame that comes twice counts once. Its class is what a file says, else what the person said last; a kept frame
    whose answer was taken back is dropped. A file's ``holdout`` counts, but no frame that was held out is released by
    it. Nothing is written.

    Args:
        sources: where to look.
        labels: the class names, in the model's order.
        height: rows of the frames returned.
        width: columns of the frames returned.

    Raises:
        InputError: nothing to read from, too many or too large files, an unreadable one, an unknown class, or one frame
            under two classes.
        StateError: the answers or the kept samples cannot be read.
    """
    found: dict[str, _Found] = {}
    folder = sources.folder
    has_files = folder is not None and (any(folder.glob("*.npz")) or any(folder.glob("*/")))
    if folder is not None and has_files:
        _join_files(found, _filed("files", folder, labels, (height, width)), labels, folder)
    for place in sources.given:
        _join_files(found, _filed("given", place, labels, (height, width)), labels, place)
    said = _answers(sources.spool)
    if sources.spool is not None:
        for frame in _named(sources.spool, said, labels, (height, width)):
            if frame.key not in found or found[frame.key].source == "named":  # of two answers the last counts
                found[frame.key] = frame
    copies, parts = _join_kept(found, sources, said, labels, (height, width))
    if not found and folder is not None and not has_files:
        list(read_samples(folder, labels))  # says what is missing there
    frames = list(found.values())
    holdout = _parts(frames, parts)
    parts |= {frame.key: bool(held) for frame, held in zip(frames, holdout, strict=True)}
    copies += [frame.copy for frame in frames if frame.copy is not None]
    images = np.stack([f.image for f in frames]) if frames else np.empty((0, height, width, 3), np.uint8)
    return Gathered(
        Samples(images, np.array([frame.label for frame in frames], np.int64), holdout),
        tuple(frame.source for frame in frames),
        sources.kept,
        tuple(
            (msgspec.structs.replace(frame, holdout=parts.get(frame.key, frame.holdout)), pixels)
            for frame, pixels in copies
        ),
        parts,
    )


def _filed(source: Source, place: Path, labels: Sequence[str], size: tuple[int, int]) -> Iterator[_Found]:
    """The frames of a place. As soon as one file says which are held out, the files there decide for all."""
    packs = list(read_samples(place, labels))
    decided = any(pack.holdout is not None and pack.holdout.any() for pack in packs)
    for pack in packs:
        asked = pack.holdout if pack.holdout is not None else np.zeros(len(pack.labels), np.bool_)
        for image, sized, label, held in zip(pack.images, resize(pack.images, *size), pack.labels, asked, strict=True):
            key, copy = _copy(image, sized, labels[int(label)])
            wish = bool(held) if decided else None
            yield _Found(key, sized, int(label), source, wish, copy if source == "given" else None)


def _join_files(found: dict[str, _Found], frames: Iterable[_Found], labels: Sequence[str], place: Path) -> None:
    """Add frames of files; of copies one stays, and one that a file holds out before others."""
    for frame in frames:
        known = found.get(frame.key)
        if known is not None and known.label != frame.label:
            pair = f"'{labels[known.label]}' and '{labels[frame.label]}'"
            raise InputError(f"one frame in {place} is labelled both {pair}", next_step="remove one of them")
        if known is None:
            found[frame.key] = frame
        elif frame.asked:
            found[frame.key] = replace(known, asked=True)


def _answers(spool: SpoolFolder | None) -> dict[str, str]:
    """What people said of the spool's frames that counts: the class by the frame's name there."""
    if spool is None:
        return {}
    return {answer.entry: answer.label for answer in AnswerLog(spool.answers_path).answers() if answer.kind == "class"}


def _named(
    spool: SpoolFolder, said: Mapping[str, str], labels: Sequence[str], size: tuple[int, int]
) -> Iterator[_Found]:
    """The frames that people gave a class which the model knows. Damaged ones are set aside."""
    for entry, label in said.items():
        # The name is a line of a file: one that is no frame's could lead anywhere, and what is read there be set aside.
        frame = spool.read(spool.answered / entry) if label in labels and parse_name(entry, 0) is not None else None
        if frame is not None:
            image = np.frombuffer(frame.pixels, np.uint8).reshape(frame.header.height, frame.header.width, 3)
            sized = resize(image[None], *size)[0]
            key, copy = _copy(image, sized, label, entry)
            yield _Found(key, sized, labels.index(label), "named", None, copy)


def _join_kept(
    found: dict[str, _Found],
    sources: Sources,
    said: Mapping[str, str],
    labels: Sequence[str],
    size: tuple[int, int],
) -> tuple[list[tuple[KeptFrame, bytes]], dict[str, bool]]:
    """Add kept samples; returns those of classes that the model does not know, which stay kept, and all parts."""
    others: list[tuple[KeptFrame, bytes]] = []
    if sources.kept is None:
        return others, {}
    kept = sources.kept.frames()
    for frame, pixels in kept:
        label = said.get(frame.entry, "") if frame.entry and sources.spool is not None else frame.label
        if not label or frame.key in found:
            continue
        copy = msgspec.structs.replace(frame, label=label), pixels
        if label not in labels:
            others.append(copy)
            continue
        image = np.frombuffer(pixels, np.uint8).reshape(1, frame.height, frame.width, 3)
        found[frame.key] = _Found(frame.key, resize(image, *size)[0], labels.index(label), "kept", None, copy)
    return others, {frame.key: frame.holdout for frame, _ in kept} | sources.kept.index().parts


def _copy(
    image: NDArray[np.uint8], sized: NDArray[np.uint8], label: str, entry: str = ""
) -> tuple[str, tuple[KeptFrame, bytes] | None]:
    """The frame's key, and what may be kept: itself, or where it is too large, in the model's size."""
    pixels = image.tobytes()
    key = frame_key(image.shape[0], image.shape[1], pixels)
    if image.nbytes > MAX_FRAME_BYTES:
        image, pixels = sized, sized.tobytes()
    if image.nbytes > MAX_FRAME_BYTES:
        return key, None
    return key, (KeptFrame(key, label, False, image.shape[0], image.shape[1], entry), pixels)


def _parts(frames: Sequence[_Found], parts: Mapping[str, bool]) -> NDArray[np.bool_]:
    """Whether each frame is held out."""
    holdout = np.array([parts.get(frame.key, False) or bool(frame.asked) for frame in frames], np.bool_)
    for label in {frame.label for frame in frames}:
        members = [n for n, frame in enumerate(frames) if frame.label == label and frame.asked is None]
        if len(members) > 1:
            wanted = max(1, round(HOLDOUT_SHARE * len(members))) - int(holdout[members].sum())
            new = sorted((n for n in members if frames[n].key not in parts), key=lambda n: frames[n].key)
            holdout[new[: max(0, wanted)]] = True
    return holdout
