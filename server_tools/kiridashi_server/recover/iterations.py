"""From a plan to a working classifier: cut, repair, ridge head, and a stated number of iterations.

After a repair the layers go on seeing what the dense model saw, so normalisations keep their statistics, in the
iterations too: batches of a few images from a narrow domain have statistics that blow up channels which hardly fire
there. Half of the way is gone that the iterations lead: a few samples of one look pull weights far, and the mean of the
weights before and after stands other looks better (Wortsman et al. 2022, arXiv 2109.01903, for large models).

Without a repair the statistics of the dense model do not fit the cut one; then they are re-estimated before the
iterations and after them, and follow the batches in between.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from kiridashi.errors import InputError
from torch import Tensor, fx, nn
from torch.nn import functional

from kiridashi_server.backbone import Backbone
from kiridashi_server.classifier import Classifier
from kiridashi_server.graph.cut import cut
from kiridashi_server.graph.plan import Plan
from kiridashi_server.graph.program import copy_program
from kiridashi_server.graph.statistics import reestimate_batch_norm, set_batch_norm_training
from kiridashi_server.progress import Progress, no_progress
from kiridashi_server.recover.blank import Blank
from kiridashi_server.recover.descent import Schedule, default_rate, descend
from kiridashi_server.recover.inputs import augment, run_batched, shuffled_batches, to_input, training_batches
from kiridashi_server.recover.repair import DEFAULT_STRENGTH, repair
from kiridashi_server.recover.ridge import DEFAULT_RIDGE, fit_ridge_head
from kiridashi_server.tasks.task import Samples


@dataclass(frozen=True)
class RecoverSettings:
    """How a cut model is recovered.

    Attributes:
        iterations: optimiser steps (Adam) on all weights after the closed-form part; 0 is allowed.
        learning_rate: of Adam, falling to zero along a cosine; ``None``: :func:`default_rate`.
        way: how much of the way from the weights before the iterations to those after them is gone, above 0, at most 1.
        batch_size: images a step.
        ridge: relative strength of the head's ridge regression.
        repair: whether consumers are re-fitted in closed form after the cut; decides the treatment of statistics.
        repair_strength: relative ridge strength of that.
        repair_images: at most this many (augmented) images are used for it.
    """

    iterations: int = 20
    learning_rate: float | None = None
    way: float = 0.5
    batch_size: int = 32
    ridge: float = DEFAULT_RIDGE
    repair: bool = True
    repair_strength: float = DEFAULT_STRENGTH
    repair_images: int = 72

    def __post_init__(self) -> None:
        rates = [self.ridge, self.repair_strength] + ([] if self.learning_rate is None else [self.learning_rate])
        if self.iterations < 0 or self.batch_size < 2 or min(*rates, self.way) <= 0 or self.way > 1:
            raise InputError(
                f"recovery settings are out of range: {self}",
                why="iterations are at least 0, the batch size at least 2, the rates, strengths and the way above 0, "
                "the way at most 1",
            )


@dataclass(frozen=True, eq=False)
class Recovered:
    """A working classifier, its plan, the loss of every iteration, and the wall time of the whole recovery."""

    model: Classifier
    plan: Plan
    losses: tuple[float, ...]
    seconds: float


def recover_cut(
    backbone: Backbone,
    plan: Plan,
    samples: Samples,
    *,
    classes: int,
    settings: RecoverSettings = RecoverSettings(),
    seed: int,
    progress: Progress = no_progress,
    blank: Blank | None = None,
) -> Recovered:
    """Carry out ``plan`` on the backbone and recover the result on ``samples``.

    Args:
        backbone: stays as it is.
        plan: for its layout.
        samples: the task's few labelled samples; every use of data is of these.
        classes: number of classes of the task.
        settings: how.
        seed: of augmentation and batches. The same arguments give the same model on the same machine.
        progress: told about iterations.
        blank: what the cut is made from, with what ``plan`` means there; by default the backbone itself.
    """
    start = time.perf_counter()
    inputs = to_input(backbone, samples.images)
    generator = torch.Generator().manual_seed(seed)
    small = cut_and_repair(blank or Blank.of(backbone, plan), inputs, settings, generator)
    model, losses = recover(small, inputs, samples, classes, settings, generator, progress)
    return Recovered(model, plan, losses, time.perf_counter() - start)


def cut_and_repair(
    blank: Blank, inputs: Tensor, settings: RecoverSettings, generator: torch.Generator
) -> fx.GraphModule:
    """The blank cut by its plan, and repaired on augmented ``inputs`` if the settings say so."""
    small = cut(blank.program, blank.tracking, blank.plan)
    if not settings.repair:
        return small
    images = _repair_images(inputs, settings.repair_images, generator)
    return repair(blank.program, blank.tracking, blank.plan, small, images, settings.repair_strength).program


def recover(
    program: fx.GraphModule,
    inputs: Tensor,
    samples: Samples,
    classes: int,
    settings: RecoverSettings,
    generator: torch.Generator,
    progress: Progress = no_progress,
) -> tuple[Classifier, tuple[float, ...]]:
    """Ridge head and iterations for a program that is cut already, and repaired if the settings say so (it is copied).

    Args:
        program: cut features, [N, 3, H, W] to [N, D].
        inputs: ``samples`` as normalised input.
        samples: only the labels are read.
        classes: number of classes.
        settings: how.
        generator: of augmentation and batches.
        progress: told about iterations.

    Returns:
        The classifier in evaluation mode, and the loss of every iteration.
    """

    def refreshed(features: fx.GraphModule) -> fx.GraphModule:
        if settings.repair:
            return copy_program(features)
        return reestimate_batch_norm(features, shuffled_batches(inputs, settings.batch_size, generator))

    features = refreshed(program)
    made = run_batched(features, inputs).numpy()
    model = Classifier(features, fit_ridge_head(made, samples.labels, classes, settings.ridge).as_linear())
    if settings.iterations == 0:
        return model.requires_grad_(False).eval(), ()
    losses = _iterate(model, inputs, torch.from_numpy(samples.labels), settings, generator, progress)
    model.features = refreshed(model.features)
    return model.eval(), losses


def accuracy(model: nn.Module, backbone: Backbone, samples: Samples) -> float:
    """Share of ``samples`` that the model classifies rightly."""
    return float(correct(model, backbone, samples).mean())


def correct(model: nn.Module, backbone: Backbone, samples: Samples) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Whether each sample is classified rightly, bool [N]."""
    logits = run_batched(model, to_input(backbone, samples.images)).numpy()
    right: np.ndarray[tuple[int], np.dtype[np.bool_]] = logits.argmax(axis=1) == samples.labels
    return right


def _repair_images(inputs: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """``count`` augmented copies of the inputs, spread evenly over them."""
    order = torch.randperm(len(inputs), generator=generator)
    copies = math.ceil(count / len(inputs))
    return augment(inputs[order.repeat(copies)[:count]], generator)


def _iterate(
    model: Classifier,
    inputs: Tensor,
    labels: Tensor,
    settings: RecoverSettings,
    generator: torch.Generator,
    progress: Progress,
) -> tuple[float, ...]:
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model.requires_grad_(True)
    set_batch_norm_training(model.features, on=not settings.repair)
    rate = settings.learning_rate or default_rate(model.features, settings.iterations)
    batches = training_batches(inputs, labels, settings.batch_size, generator)

    def loss() -> Tensor:
        images, wanted = next(batches)
        return functional.cross_entropy(model(images), wanted)

    losses = descend(model.parameters(), loss, Schedule(settings.iterations, rate), progress)
    set_batch_norm_training(model.features, on=False)
    model.requires_grad_(False)
    for parameter, start in zip(model.parameters(), before, strict=True):
        parameter.copy_(torch.lerp(start, parameter, settings.way))
    return losses
