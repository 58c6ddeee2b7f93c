"""What is timed: a bundle's artifact as a line runs it, or any model file with whatever inputs it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from kiridashi.artifacts import check_file
from kiridashi.manifest import Preprocessing
from kiridashi.preprocess import softmax, to_input
from kiridashi.runtime import open_bare, open_model
from kiridashi.runtime.bare import make_feed, resolve_shapes
from kiridashi.runtime.protocol import LoadedModel, Provider
from numpy.typing import NDArray

from kiridashi_agent.jobs import Opening
from kiridashi_agent.probe import read_manifest

_FRAMES = 8
_PROCESSORS: tuple[Provider, ...] = ("cpu", "xnnpack")


@dataclass(frozen=True)
class Subject:
    """A model ready to be timed.

    Attributes:
        once: makes prediction number n.
        runtime, provider: what computes it.
        timed: whether ``once`` is what a line does, or the runtime's call alone.
    """

    once: Callable[[int], object]
    runtime: str
    provider: Provider
    timed: Literal["line", "model"]

    @property
    def in_thread(self) -> bool:
        """Whether with one thread the calling thread does all the work, so that its processor time is the model's."""
        return self.provider in _PROCESSORS


def open_artifact(folder: Path, name: str, opening: Opening) -> Subject:
    """An artifact of a bundle folder, checked against the manifest.

    Raises:
        BundleError: no such artifact, a damaged file, or the runtime refuses it.
        RuntimeUnavailableError: its runtime is not installed, or none of the providers is here.
    """
    manifest = read_manifest(folder)
    artifact = manifest.artifact(name)
    check_file(folder / name, artifact)
    model = open_model(folder / name, artifact, opening.threads, manifest.artifacts, opening.providers)
    return as_line(model, manifest.preprocessing)


def open_plain(path: Path, opening: Opening) -> Subject:
    """A model file that has no manifest.

    A classifier of one RGB image is run as a line would, with a preprocessing of the model's own size, unless
    ``opening.bare`` is set. Any other model is run by itself, on made-up values.

    Raises:
        InputError: the file is missing or of an unknown kind, or the shape of an input is not known.
        RuntimeUnavailableError, BundleError: as :func:`kiridashi.runtime.open_bare`.
    """
    model = open_bare(path, opening.threads, opening.providers)
    shapes = resolve_shapes(model.inputs, opening.shapes, path.name)
    model.prepare(shapes)
    classifier = None if opening.bare else model.as_classifier(shapes)
    if classifier is not None:
        shape = next(iter(shapes.values()))
        height, width = shape[2:] if classifier.layout == "NCHW" else shape[1:3]
        return as_line(classifier, Preprocessing(height, width, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)))
    rng = np.random.default_rng(0)
    feeds = [make_feed(model.inputs, shapes, rng) for _ in range(_FRAMES)]
    return Subject(lambda n: model.run(feeds[n % _FRAMES]), model.runtime, model.provider, "model")


def as_line(model: LoadedModel, preprocessing: Preprocessing) -> Subject:
    """A prediction as the line application makes it: preprocessing of a frame of the model's size, runtime, softmax."""
    frames = random_frames(preprocessing)

    def once(n: int) -> None:
        softmax(model.run(to_input(frames[n % _FRAMES][None], preprocessing, model.layout)))

    return Subject(once, model.runtime, model.provider, "line")


def random_frames(preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """A few frames of the model's size, uint8 [N, H, W, 3], always the same ones."""
    shape = (_FRAMES, preprocessing.height, preprocessing.width, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
