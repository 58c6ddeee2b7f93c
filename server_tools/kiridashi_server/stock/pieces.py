"""The stock: the backbone pruned step by step on the bank's tasks, every step kept.

Task-specific pruning that goes step by step, with some tuning in between, makes better small models than one deep cut.
But a line would wait for it, and its few samples have to carry it. The mean of a bank's scores is the same for every
line, so these steps can be taken once, on all past tasks together:

* the first piece is the whole backbone, tuned on the tasks jointly (:mod:`.joint`);
* every further piece is cut out of the one before, by the bank's scores, repaired in closed form, and tuned again.

A new line's model is then cut out of the smallest piece that has all its units, which is one small step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from kiridashi.errors import InputError
from torch import fx

from kiridashi_server.amp.scores import ScoreMap
from kiridashi_server.backbone import Backbone
from kiridashi_server.budget.solver import plan_size
from kiridashi_server.graph.cut import cut
from kiridashi_server.graph.plan import Plan
from kiridashi_server.graph.program import tensor_names, tensor_of
from kiridashi_server.graph.tracker import Tracking, track
from kiridashi_server.progress import Progress, no_progress
from kiridashi_server.recover.blank import Blank
from kiridashi_server.recover.descent import Schedule, default_rate
from kiridashi_server.recover.inputs import augment
from kiridashi_server.recover.repair import DEFAULT_STRENGTH, repair
from kiridashi_server.stock.joint import JointTasks, train_jointly
from kiridashi_server.tasks.seeding import generator_for
from kiridashi_server.tasks.task import Samples

_WARM_UP = 0.1
_STEPS = tuple(step / 100 for step in range(5, 100, 5))
_RATED_AS = 20
"""However long joint training is, it goes at the rate of a recovery of so many iterations."""


@dataclass(frozen=True)
class StockSettings:
    """How a stock is made.

    Attributes:
        shares: of the backbone's parameters, one piece each, descending; the first is 1.
        iterations: of joint training, for each piece.
        learning_rate: of these, after a rise and before a fall; ``None``: 5e-4, or 1e-5 for a model with layer
            normalisation.
        batch_size: images a step.
        repair_images: images that a piece is repaired on.
        repair_strength: relative ridge strength of that.
    """

    shares: tuple[float, ...] = (1.0, 0.6, 0.35, 0.2)
    iterations: int = 300
    learning_rate: float | None = None
    batch_size: int = 48
    repair_images: int = 384
    repair_strength: float = DEFAULT_STRENGTH

    def __post_init__(self) -> None:
        falling = all(after < before for before, after in zip(self.shares, self.shares[1:], strict=False))
        if not self.shares or self.shares[0] != 1 or not falling or self.shares[-1] <= 0:
            raise InputError(
                f"the pieces' shares are out of order: {self.shares}", next_step="start with 1 and let them fall"
            )
        rate = 1.0 if self.learning_rate is None else self.learning_rate
        if min(self.iterations, self.batch_size, self.repair_images) < 1 or min(rate, self.repair_strength) <= 0:
            raise InputError(
                f"stock settings are out of range: {self}", why="counts are at least 1, rate and strength above 0"
            )


@dataclass(frozen=True, eq=False)
class Piece:
    """The backbone cut by ``plan`` (a plan of the dense layout) and tuned on the bank's tasks."""

    plan: Plan
    program: fx.GraphModule

    @cached_property
    def tracking(self) -> Tracking:
        """What is known of the program's dimensions."""
        return track(self.program, cuttable_output=True)


@dataclass(frozen=True, eq=False)
class Stock:
    """Pieces of one backbone, the largest first.

    Attributes:
        backbone_fingerprint, layout_digest: what they are cut from.
        pieces: the first is the whole backbone.
    """

    backbone_fingerprint: str
    layout_digest: str
    pieces: tuple[Piece, ...]

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 of all pieces: plans and weights."""
        whole = hashlib.sha256()
        for piece in self.pieces:
            whole.update(piece.plan.to_json().encode())
            for name in tensor_names(piece.program):
                whole.update(name.encode() + tensor_of(piece.program, name).detach().contiguous().numpy().tobytes())
        return whole.hexdigest()

    def number_for(self, plan: Plan) -> int:
        """Which piece is the smallest that has all units of ``plan`` (a plan of the dense layout)."""
        return max(number for number, piece in enumerate(self.pieces) if _contains(piece.plan, plan))

    def blank(self, plan: Plan) -> Blank:
        """That piece, with what ``plan`` means there."""
        piece = self.pieces[self.number_for(plan)]
        return Blank(piece.program, piece.tracking, _inside(piece.plan, plan, piece.tracking))


def piece_plans(backbone: Backbone, scores: ScoreMap, shares: Sequence[float]) -> list[Plan]:
    """The best cuts of these shares of the parameters, descending, each widened by what smaller cuts keep.

    The best small cut is not always part of the best large one: it may keep a few more units of some group. A piece
    without them would be of no use for it, so each holds the best cuts of a row of smaller sizes, which makes it larger
    than its share by some per cent.
    """
    dense = backbone.costs.parameters({})
    sizes = sorted({*shares, *(step for step in _STEPS if step > 0.5 * shares[-1])})
    widened: dict[str, set[int]] = {group.name: set() for group in backbone.layout.groups}
    plans: dict[float, Plan] = {}
    for share in sizes:
        plan = plan_size(backbone.layout, backbone.costs, scores, int(share * dense))
        for name, units in plan.kept.items():
            widened[name] |= set(units)
        plans[share] = Plan.of(backbone.layout, widened)
    return [plans[share] for share in shares]


class StockMaker:
    """Makes the pieces one by one, so that who keeps them can go on after a stop; its length is their number.

    Args:
        backbone: stays as it is.
        tasks: labelled samples of past tasks, the more views the better.
        plans: of the pieces, the first whole, each inside the one before (:func:`piece_plans`).
        settings: how.
        seed: of batches and augmentation. The same arguments give the same pieces on the same machine.

    Raises:
        InputError: no task, or images of another size than the backbone's.
    """

    def __init__(
        self,
        backbone: Backbone,
        tasks: Sequence[Samples],
        plans: Sequence[Plan],
        settings: StockSettings,
        *,
        seed: int,
    ) -> None:
        self._plans = plans
        self._joint = JointTasks.of(backbone, tasks)
        self._backbone = backbone
        self._settings = settings
        self._seed = seed

    def __len__(self) -> int:
        return len(self._plans)

    def piece(self, before: Sequence[Piece], progress: Progress = no_progress) -> Piece:
        """The next piece after those ``before``; depends on the last of them alone."""
        plan, settings = self._plans[len(before)], self._settings
        generator = torch.Generator().manual_seed(_stream(self._seed, len(before)))
        program = self._cut(before[-1], plan, generator) if before else self._backbone.program
        rate = settings.learning_rate or default_rate(program, _RATED_AS)
        schedule = Schedule(settings.iterations, rate, _WARM_UP)
        tuned = train_jointly(
            program,
            self._joint,
            schedule,
            batch_size=settings.batch_size,
            generator=generator,
            progress=progress,
        )
        return Piece(plan, tuned)

    def stock(self, pieces: Sequence[Piece]) -> Stock:
        """The pieces as a stock."""
        return Stock(self._backbone.fingerprint, self._backbone.layout.digest, tuple(pieces))

    def _cut(self, piece: Piece, plan: Plan, generator: torch.Generator) -> fx.GraphModule:
        inner = _inside(piece.plan, plan, piece.tracking)
        small = cut(piece.program, piece.tracking, inner)
        rows = self._joint.draw(self._settings.repair_images, generator)
        images = augment(self._joint.inputs[rows], generator)
        return repair(piece.program, piece.tracking, inner, small, images, self._settings.repair_strength).program


def _stream(seed: int, number: int) -> int:
    """A seed of the piece's own: those of two runs with neighbouring seeds must not be the same."""
    return int(generator_for(seed, "stock", number).integers(2**63))


def _contains(outer: Plan, inner: Plan) -> bool:
    return all(set(units) <= set(outer.kept[name]) for name, units in inner.kept.items())


def _inside(outer: Plan, inner: Plan, tracking: Tracking) -> Plan:
    """``inner`` in the numbers of the units that ``outer`` has kept."""
    places = {
        name: np.searchsorted(np.asarray(outer.kept[name]), units)
        for name, units in inner.kept.items()
        if name in tracking.layout.sizes  # a group that was cut to its last unit is none any more
    }
    return Plan.of(tracking.layout, {name: where.tolist() for name, where in places.items()})
