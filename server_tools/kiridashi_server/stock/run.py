"""Making a stock in stages, so that a long making goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import msgspec
import numpy as np
from kiridashi.artifacts import sha256_file
from kiridashi.errors import InputError

from kiridashi_server.amp.scores import ScoreMap
from kiridashi_server.backbone import Backbone
from kiridashi_server.bank.record import Record
from kiridashi_server.graph.cut import load_cut, save_cut
from kiridashi_server.progress import Progress
from kiridashi_server.similarity.assess import mean_scores
from kiridashi_server.stages import Workspace
from kiridashi_server.stock.pieces import Piece, Stock, StockMaker, StockSettings, piece_plans
from kiridashi_server.stock.store import StockError
from kiridashi_server.tasks.task import Samples, Task

_FILE = "piece.safetensors"


class PieceMade(msgspec.Struct, frozen=True):
    """A finished piece: the parameters that it keeps, and its file's SHA-256."""

    parameters: int
    sha256: str


def run_stock(
    workspace: Workspace,
    backbone: Backbone,
    tasks: Sequence[Task],
    records: Sequence[Record],
    settings: StockSettings,
    seed: int,
    bar: Callable[[str], AbstractContextManager[Progress]],
) -> Stock:
    """Make a stock on past tasks, cut by the mean of their records' scores; every piece is a stage.

    Args:
        workspace: keeps finished pieces.
        backbone: stays as it is.
        tasks: their splits ``train`` and ``val`` are used.
        records: of this backbone.
        settings, seed: as :class:`~kiridashi_server.stock.pieces.StockMaker` has them.
        bar: shows progress.

    Raises:
        InputError: no record is of this backbone, there is no task, or two have the same name.
        StockError: a finished piece was changed.
    """
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"two tasks are called '{twice[0]}'", next_step="name each task once")
    samples = [server_samples(task) for task in tasks]
    plans = piece_plans(backbone, stock_scores(backbone, records), settings.shares)
    maker = StockMaker(backbone, samples, plans, settings, seed=seed)
    identity = [backbone.fingerprint, backbone.input_size, [task.digest for task in tasks], settings, seed]
    inputs = [*identity, [plan.to_json() for plan in plans]]
    pieces: list[Piece] = []
    for number in range(len(maker)):

        def work(folder: Path, before: Sequence[Piece] = tuple(pieces)) -> PieceMade:
            with bar(f"piece {len(before) + 1} of {len(maker)}") as advance:
                piece = maker.piece(before, advance)
            save_cut(folder / _FILE, piece.plan, piece.program)
            return PieceMade(backbone.costs.parameters(piece.plan.counts), sha256_file(folder / _FILE))

        name = f"stock-piece-{number + 1}"
        file = workspace.place(name) / _FILE
        made = workspace.run(name, [*inputs, number], work, PieceMade)
        if not file.is_file() or sha256_file(file) != made.sha256:
            raise StockError(
                f"{file} is missing or changed", next_step=f"delete {workspace.place(name)}, then run the command again"
            )
        pieces.append(Piece(*load_cut(backbone.program, backbone.tracking, file)))
    return maker.stock(pieces)


def stock_scores(backbone: Backbone, records: Sequence[Record]) -> ScoreMap:
    """The mean of the scores of all records of this backbone.

    Raises:
        InputError: there is none.
    """
    own = [record for record in records if record.backbone_fingerprint == backbone.fingerprint]
    if not own:
        raise InputError(
            f"the bank has no record of {backbone.name}",
            why="a stock is cut by the mean of its records' scores",
            next_step="learn some: kiridashi bank learn",
        )
    return mean_scores(own)


def server_samples(task: Task) -> Samples:
    """All of a task that belongs to the server: its splits ``train`` and ``val``.

    Raises:
        TaskError: it has no split ``train``.
    """
    parts = [task.split("train")]
    if "val" in task.splits:
        parts.append(task.split("val"))
    return Samples(
        np.concatenate([part.images for part in parts]),
        np.concatenate([part.labels for part in parts]),
        tuple(source for part in parts for source in part.sources),
    )
