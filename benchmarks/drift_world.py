"""A simulated camera over one line, what happens to it, and the numbers that the line notes of every frame.

The part lies in the middle of a fixed jig. Parts are those of a shipped task, in the two drawing styles that the model
was made on. The model is EfficientNet-Lite0 at 64 pixels with a closed-form head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from kiridashi.drift.rows import Row, shortened
from kiridashi.drift.statistics import frame_statistics
from kiridashi_server.backbone import Backbone
from kiridashi_server.recover.ridge import fit_ridge_head
from kiridashi_server.tasks import load_shipped, shipped_names
from kiridashi_server.tasks.drawings import Views
from kiridashi_server.tasks.scenes import background
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Images = NDArray[np.uint8]
Change = Callable[[Images, np.random.Generator], Images]
SIDE, PART = 64, 44
BATCH = 64
PART_FRAMES, LIGHT_FRAMES = 15.0, 50.0
"""Video: sampled frames that a part stays for, and after which the light has forgotten itself, on average."""
_GAINS = np.linspace(0.91, 1.09, 7)
_LIGHT_SPREAD = 1.5
_NOISES = 2


def _each(change: Callable[[Image.Image], Image.Image]) -> Change:
    return lambda images, _: np.stack([np.asarray(change(Image.fromarray(image))) for image in images])


def _gain(*factors: float) -> Change:
    return lambda images, _: np.clip(images * np.array(factors) + 0.5, 0, 255).astype(np.uint8)


def _noise(images: Images, rng: np.random.Generator) -> Images:
    return np.clip(images + rng.normal(0, 9, images.shape) + 0.5, 0, 255).astype(np.uint8)


def _moved(images: Images, _: np.random.Generator) -> Images:
    padded = np.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)), mode="edge")
    return np.ascontiguousarray(padded[:, 1 : 1 + SIDE, 6 : 6 + SIDE])


CHANGES: Mapping[str, Change] = {
    "brightness": _gain(0.85, 0.85, 0.85),
    "brightness_strong": _gain(0.6, 0.6, 0.6),
    "blur": _each(lambda image: image.filter(ImageFilter.GaussianBlur(0.6))),
    "noise": _noise,
    "colour_cast": _gain(1.06, 1.0, 0.94),
    "camera_shift": _moved,
    "camera_rotation": _each(lambda image: image.rotate(5, Image.Resampling.BILINEAR, fillcolor=(90, 90, 90))),
}
OTHERS = ("new_style", "new_class", "new_class_quarter", "class_mix")


@dataclass(frozen=True, eq=False)
class World:
    """Rows of frames: of the calm line by class, of every change, and of video (parts, gains, noises)."""

    task: str
    labels: tuple[str, ...]
    accuracy: float
    calm: tuple[Row, ...]
    truth: NDArray[np.int64]
    changed: Mapping[str, tuple[Row, ...]]
    video: Mapping[str, tuple[tuple[tuple[Row, ...], ...], ...]]


def make_world(task_number: int, frames: int, parts: int, seed: int) -> World:
    """Render, predict and note everything that streams are then drawn from.

    Args:
        task_number: which shipped task.
        frames: of the calm line, and of every change, at most.
        parts: of the video.
        seed: of everything that is random.
    """
    names = shipped_names()
    name, other = names[task_number], names[(task_number + 1) % len(names)]
    rng = np.random.default_rng([seed, task_number])
    jig = background(SIDE, rng)
    made_on = load_shipped(name, PART, seed, Views(train=6)).split("train")
    seen = load_shipped(name, PART, seed + 1, Views(train=16, val=16, test_per_class=60))
    note = _Notes.of(_placed(made_on.images, jig, rng), made_on.labels, len(seen.labels))
    train, val, test = (seen.split(split) for split in ("train", "val", "test"))
    images, truth = np.concatenate([train.images, val.images]), np.concatenate([train.labels, val.labels])
    chosen = rng.permutation(len(images))[:frames]
    calm, truth = _placed(images[chosen], jig, rng), truth[chosen]
    strangers = load_shipped(other, PART, seed, Views(train=8)).split("train").images
    few = calm[: max(1, frames // 2)]
    changed = {change: note.rows(make(few, rng)) for change, make in CHANGES.items()}
    changed["new_style"] = note.rows(_placed(test.images[rng.permutation(len(test.images))[:frames]], jig, rng))
    changed["new_class"] = changed["new_class_quarter"] = note.rows(
        _placed(strangers[rng.permutation(len(strangers))[:frames]], jig, rng)
    )
    rows = note.rows(calm)
    changed["class_mix"] = tuple(row for row, label in zip(rows, truth, strict=True) if label == 0)
    video = {"calm": _video(note, calm[:parts], rng)}
    for change in ("brightness", "blur"):
        video[change] = _video(note, CHANGES[change](calm[:parts], rng), rng)
    right = float(np.mean([row.best == label for row, label in zip(rows, truth, strict=True)]))
    return World(name, seen.labels, right, rows, truth, changed, video)


def iid_stream(world: World, count: int, rng: np.random.Generator) -> list[Row]:
    """Independent frames of the calm line."""
    return [world.calm[n] for n in rng.integers(0, len(world.calm), count)]


def changed_stream(world: World, change: str, count: int, rng: np.random.Generator) -> list[Row]:
    """Independent frames of the changed line; of a new class are half, or a quarter; a class in the mix gets half."""
    after = world.changed[change]
    share = {"new_class": 0.5, "new_class_quarter": 0.25, "class_mix": 0.5}.get(change, 1.0)
    mixed = rng.random(count) < share
    picks, calm = rng.integers(0, len(after), count), rng.integers(0, len(world.calm), count)
    return [after[n] if new else world.calm[m] for new, n, m in zip(mixed, picks, calm, strict=True)]


def video_stream(world: World, change: str, count: int, rng: np.random.Generator) -> list[Row]:
    """Frames of parts that stay for a while, under light that wanders."""
    parts = world.video[change]
    starts = rng.random(count) < 1 / PART_FRAMES
    part = rng.integers(0, len(parts), starts.sum() + 1)[np.cumsum(starts)]
    keep = np.exp(-1 / LIGHT_FRAMES)
    steps = rng.normal(0, np.sqrt(1 - keep**2), count)
    light, levels = rng.normal(), np.empty(count)
    for n, step in enumerate(steps.tolist()):
        light = keep * light + step
        levels[n] = light
    middle = len(_GAINS) // 2
    gain = np.clip(np.rint(middle + _LIGHT_SPREAD * levels), 0, len(_GAINS) - 1).astype(int)
    noise = rng.integers(0, _NOISES, count)
    return [parts[p][g][n] for p, g, n in zip(part.tolist(), gain.tolist(), noise.tolist(), strict=True)]


def video_draws(world: World, count: int, rng: np.random.Generator) -> list[Row]:
    """Frames that are as those of calm video, and independent of each other."""
    return [video_stream(world, "calm", 1, rng)[0] for _ in range(count)]


@dataclass(frozen=True, eq=False)
class _Notes:
    """What the line does with frames: predict, and note."""

    features: torch.fx.GraphModule
    backbone: Backbone
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]

    @classmethod
    def of(cls, images: Images, labels: NDArray[np.int64], classes: int) -> _Notes:
        backbone = Backbone.load("efficientnet-lite0", image_size=SIDE)
        empty = np.zeros((0, 0), np.float32)
        blank = cls(backbone.program.eval(), backbone, empty, empty)
        head = fit_ridge_head(blank._features(images), labels, classes)
        return cls(blank.features, backbone, head.weight, head.bias)

    def rows(self, images: Images) -> tuple[Row, ...]:
        logits = self._features(images) @ self.weight.T + self.bias
        values = np.exp(logits - logits.max(axis=1, keepdims=True))
        values /= values.sum(axis=1, keepdims=True)
        return tuple(
            shortened(Row(0.0, int(p.argmax()), tuple(frame_statistics(image, p, (SIDE, SIDE)).tolist())))
            for image, p in zip(images, values, strict=True)
        )

    def _features(self, images: Images) -> NDArray[np.float32]:
        pieces = []
        with torch.no_grad():
            for start in range(0, len(images), BATCH):
                pixels = torch.from_numpy(images[start : start + BATCH]).permute(0, 3, 1, 2).float() / 255
                pieces.append(self.features(self.backbone.normalise(pixels)).numpy())
        return np.concatenate(pieces).astype(np.float32)


def _placed(images: Images, jig: NDArray[np.float32], rng: np.random.Generator) -> Images:
    """Parts in the middle of the jig, whose light is not always the same."""
    light = rng.normal(1.0, 0.03, (len(images), 1, 1, 1))
    frames = np.clip(jig[None] * light + rng.normal(0, 3, (len(images), SIDE, SIDE, 3)) + 0.5, 0, 255).astype(np.uint8)
    low = (SIDE - PART) // 2
    frames[:, low : low + PART, low : low + PART] = images
    return frames


def _video(note: _Notes, parts: Images, rng: np.random.Generator) -> tuple[tuple[tuple[Row, ...], ...], ...]:
    """Rows of every part under every gain with noises of their own: [parts][gains][noises]."""
    many = np.repeat(parts, len(_GAINS) * _NOISES, axis=0)
    gains = np.tile(np.repeat(_GAINS, _NOISES), len(parts))[:, None, None, None]
    frames = np.clip(many * gains + rng.normal(0, 2, many.shape) + 0.5, 0, 255).astype(np.uint8)
    rows = note.rows(frames)
    return tuple(_grouped(_grouped(rows, _NOISES), len(_GAINS)))


def _grouped(items: Sequence[object], size: int) -> tuple:  # type: ignore[type-arg]
    return tuple(tuple(items[n : n + size]) for n in range(0, len(items), size))
