"""What tuning wins back on a device whose images have a style that the server never saw."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from kiridashi.manifest import TrainSpec
from kiridashi.preprocess import to_input
from kiridashi.samples import Samples
from kiridashi_agent.closed_form import Head, fit_head
from kiridashi_agent.steps import StepsPlan, balanced_batches, relit, run_steps
from kiridashi_server.classifier import Classifier
from kiridashi_server.export.patches import with_parameters
from kiridashi_server.graph import fold_batch_norm
from kiridashi_server.recover.iterations import RecoverSettings, recover_cut
from kiridashi_server.tasks import Task

from benchmarks.trainstep_subject import BATCH, CLASSES, FloatArray, Subject, TorchStep, preprocessing

HEAD = ("head.weight", "head.bias")
RIDGE = 1.0
TORCH_RATES = (0.005, 0.01, 0.02)


@dataclass(frozen=True, eq=False)
class Line:
    """A line's model as shipped (recovered on the server's styles), the device's own samples, and unseen ones."""

    subject: Subject
    model: Classifier
    samples: Samples
    test: Samples
    folder: Path
    iterations: int
    seed: int

    def accuracy(self, values: Mapping[str, FloatArray]) -> float:
        """Share of the unseen samples that the model with other values gets right."""
        model = with_parameters(self.model, dict(values))
        with torch.no_grad():
            found = model(torch.from_numpy(self._input(self.test))).argmax(1).numpy()
        return float((found == self.test.labels).mean())

    def with_head(self) -> dict[str, FloatArray]:
        """All parameters, the head fitted in closed form as the device does it."""
        values = {name: value.detach().numpy().copy() for name, value in self.model.named_parameters()}
        with torch.no_grad():
            features = self.model.features(torch.from_numpy(self._input(self.samples))).numpy()
        fit = fit_head(features, self.samples.labels, Head(values[HEAD[0]], values[HEAD[1]]), RIDGE)
        return values | {HEAD[0]: fit.head.weight, HEAD[1]: fit.head.bias}

    def tuned(self, name: str, start: Mapping[str, FloatArray], rate: float | None = None) -> dict[str, FloatArray]:
        """The values after the device's iterations of one size of the train step."""
        entry = next(one.entry for one in self.subject.variants if one.entry.name == name)
        rate = entry.learning_rate if rate is None else rate
        spec = TrainSpec(entry.graph, "", entry.parameters, BATCH, self.iterations, rate, *HEAD, RIDGE, (entry,))
        plan = StepsPlan(
            graph=self.folder / entry.graph,
            spec=spec,
            variant=type(entry)(entry.name, entry.graph, entry.parameters, rate, 0, 0, 0),
            may_give_up=False,
            preprocessing=preprocessing(self.subject.backbone),
            classes=CLASSES,
            iterations=self.iterations,
            max_seconds=600.0,
            threads=1,
            trained=entry.parameters,
        )
        return {**start, **run_steps(plan, start, self.samples, np.random.default_rng(self.seed)).values}

    def tuned_by_torch(self, start: Mapping[str, FloatArray], rate: float) -> dict[str, FloatArray]:
        """The same iterations on all parameters in torch: same batches, light, clipping and schedule."""
        names = tuple(name for name, _ in self.model.named_parameters())
        model = with_parameters(copy.deepcopy(self.model), dict(start))
        step = TorchStep(model, names, torch.channels_last)
        rng = np.random.default_rng(self.seed)
        batches = balanced_batches(self.samples.labels, BATCH, self.iterations, rng)
        for number, chosen in enumerate(batches):
            x = to_input(relit(self.samples.images[chosen], rng), preprocessing(self.subject.backbone), "NCHW")
            y = np.eye(CLASSES, dtype=np.float32)[self.samples.labels[chosen]]
            step(x, y, rate * 0.5 * (1 + math.cos(math.pi * number / self.iterations)))
        return {name: value.detach().contiguous().numpy() for name, value in zip(names, step.trained, strict=True)}

    def _input(self, samples: Samples) -> FloatArray:
        return to_input(samples.images, preprocessing(self.subject.backbone), "NCHW")


def make_line(subject: Subject, task: Task, shots: int, iterations: int, folder: Path, seed: int) -> Line:
    """Recover the subject's cut on the server's styles and lay the files out as on a device."""
    recovered = recover_cut(
        subject.backbone,
        subject.plan,
        task.split("train").few_shot(shots, seed),
        classes=CLASSES,
        settings=RecoverSettings(),
        seed=seed,
    )
    model = Classifier(fold_batch_norm(recovered.model.features), recovered.model.head).eval()
    values = {name: value.detach().numpy() for name, value in model.named_parameters()}
    subject.with_weights(values, folder)
    few, test = task.split("tune").few_shot(shots, seed), task.split("test")
    device = Samples(few.images, few.labels, np.zeros(len(few), bool))
    return Line(
        subject, model, device, Samples(test.images, test.labels, np.ones(len(test), bool)), folder, iterations, seed
    )
