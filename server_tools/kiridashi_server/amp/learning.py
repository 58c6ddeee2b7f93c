"""Score learning: which units a task needs, asked of the very cuts that the scores themselves would make.

The backbone Θ is frozen; every unit j has a gate g_j where its consumers read it, and a task head h is trained along.
With m_ρ(S) the mask that keeps the share ρ of the parameters by the scores S,

    S_j = sqrt( E_{ρ, batch} [ (dL/dg_j)^2 ] )   at   g = m_ρ(S),    L = cross-entropy of h(f(x; Θ ⊙ g))

is solved by iteration: each step draws a share ρ (log-uniform, so that one ranking serves many sizes), masks by the
scores so far, and adds the squared gate gradients of one batch. The gradient passes the mask straight through, so a
unit that is masked out still earns score when opening it would help, and comes back. The budget needs no penalty term:
the mask meets it exactly at every step, floors of every group included. The first step sees the dense model, where the
score is the first-order one of Molchanov et al. 2019 (arXiv 1906.10771).

A transformer is scored dense, all gates open: masked by a young ranking it computes nothing of use, and the gradients
of that state, which outweigh all others, crowd what is kept into the last blocks (``docs/explanation/vit.md``).

Normalisation layers keep the pre-trained statistics. A handful of images from a narrow domain gives statistics that
blow up channels which hardly fire there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from kiridashi.errors import InputError
from torch import Tensor, nn
from torch.nn import functional

from kiridashi_server.amp.scores import ScoreArray, Scores
from kiridashi_server.backbone import Backbone
from kiridashi_server.compose.selection import select
from kiridashi_server.graph.cut import masked
from kiridashi_server.graph.gates import Gated, insert_gates
from kiridashi_server.graph.nodes import has_operator
from kiridashi_server.progress import Progress, no_progress
from kiridashi_server.recover.inputs import run_batched, to_input, training_batches
from kiridashi_server.recover.ridge import DEFAULT_RIDGE, fit_ridge_head
from kiridashi_server.tasks.task import Samples

MASKED_SHARES = (0.5, 0.3)


@dataclass(frozen=True)
class ScoreSettings:
    """How scores are learnt.

    Attributes:
        iterations: steps, one batch each.
        batch_size: augmented images a step.
        least_share: the smallest share of parameters that a step's mask keeps; the largest is 1. By default 0.3, and 1
            for a backbone with layer normalisation.
        head_learning_rate: of Adam on the head.
        ridge: relative strength of the ridge regression that the head starts from.
    """

    iterations: int = 40
    batch_size: int = 32
    least_share: float | None = None
    head_learning_rate: float = 3e-3
    ridge: float = DEFAULT_RIDGE

    def __post_init__(self) -> None:
        rates = min(self.head_learning_rate, self.ridge)
        share = 1.0 if self.least_share is None else self.least_share
        if self.iterations < 1 or self.batch_size < 1 or rates <= 0 or not 0 < share <= 1:
            raise InputError(
                f"score settings are out of range: {self}",
                why="iterations and batch size are at least 1, rates above 0, the least share above 0 and at most 1",
            )


def learn_scores(
    backbone: Backbone,
    samples: Samples,
    *,
    classes: int,
    seed: int,
    settings: ScoreSettings = ScoreSettings(),
    validation: Samples | None = None,
    progress: Progress = no_progress,
) -> Scores:
    """Learn scores for one task. The same arguments give the same scores on the same machine.

    Args:
        backbone: stays as it is.
        samples: labelled samples of the task.
        classes: number of classes.
        seed: of batches, augmentation and shares.
        settings: how.
        validation: samples that the accuracies are measured on; by default those that were learnt from.
        progress: told about iterations.

    Raises:
        InputError: images of another size than the backbone's, or fewer than two samples.
    """
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = to_input(backbone, samples.images), torch.from_numpy(samples.labels)
    features = run_batched(backbone.program, inputs).numpy()
    ridge_head = fit_ridge_head(features, samples.labels, classes, settings.ridge)
    batches = training_batches(inputs, labels, settings.batch_size, generator)
    learner = _Learner(backbone, ridge_head.as_linear(), settings, generator)
    for done in range(1, settings.iterations + 1):
        learner.step(*next(batches))
        progress(done, settings.iterations)
    judged = validation if validation is not None else samples
    accuracies = _accuracies(backbone, learner.scores(), (samples, judged), classes, settings.ridge)
    return Scores(
        groups=learner.scores(),
        iterations=settings.iterations,
        seconds=time.perf_counter() - start,
        dense_accuracy=accuracies[0],
        masked_accuracy=dict(zip(MASKED_SHARES, accuracies[1:], strict=True)),
    )


class _Learner:
    """The state of one run: summed squared gradients, the steps behind them, and the head."""

    def __init__(
        self, backbone: Backbone, head: nn.Linear, settings: ScoreSettings, generator: torch.Generator
    ) -> None:
        self._backbone = backbone
        self._costs = backbone.costs
        self._gated: Gated = insert_gates(backbone.program, backbone.tracking).requires_grad_(False)
        self._head = head
        self._optimiser = torch.optim.Adam(head.parameters(), lr=settings.head_learning_rate)
        self._least_share = settings.least_share or _default_share(backbone)
        self._generator = generator
        self._squares = {group.name: torch.zeros(group.size) for group in backbone.layout.groups}
        self._steps = 0

    def scores(self) -> dict[str, ScoreArray]:
        """The scores so far, float32 [size] by group."""
        return {name: torch.sqrt(total / max(self._steps, 1)).numpy() for name, total in self._squares.items()}

    def step(self, inputs: Tensor, labels: Tensor) -> None:
        """One batch: gradients at the mask of a sampled share into the scores, and into the head."""
        gates = self._mask()
        loss = functional.cross_entropy(self._head(self._gated(inputs, gates)), labels)
        self._optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for name, gate in gates.items():
            if gate.grad is not None:
                self._squares[name] += gate.grad**2
        self._steps += 1
        self._optimiser.step()

    def _mask(self) -> dict[str, Tensor]:
        """Gates of 1 and 0 that collect gradients, also where they are 0."""
        draw = float(torch.rand((), generator=self._generator))
        share = self._least_share ** (1 - draw) if self._steps else 1.0
        plan = select(self.scores(), self._backbone.layout, self._costs, share)
        gates = {}
        for name, total in self._squares.items():
            gate = torch.zeros_like(total)
            gate[list(plan.kept[name])] = 1
            gates[name] = gate.requires_grad_(True)
        return gates


def _default_share(backbone: Backbone) -> float:
    return 1.0 if has_operator(backbone.program, "layer_norm") else 0.3


def _accuracies(
    backbone: Backbone,
    scores: dict[str, ScoreArray],
    samples: tuple[Samples, Samples],
    classes: int,
    ridge: float,
) -> list[float]:
    """Accuracy of a ridge head on the dense and on the masked backbone, fitted on the first samples, for the second."""
    fitted, judged = samples
    plans = [select(scores, backbone.layout, backbone.costs, share) for share in MASKED_SHARES]
    modules: Sequence[nn.Module] = [
        backbone.program,
        *(masked(backbone.program, backbone.tracking, plan) for plan in plans),
    ]
    inputs, others = to_input(backbone, fitted.images), to_input(backbone, judged.images)
    found = []
    for module in modules:
        head = fit_ridge_head(run_batched(module, inputs).numpy(), fitted.labels, classes, ridge)
        logits = run_batched(module, others).numpy() @ head.weight.T + head.bias
        found.append(float((logits.argmax(axis=1) == judged.labels).mean()))
    return found
