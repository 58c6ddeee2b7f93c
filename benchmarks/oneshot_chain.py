"""The chain that a new line finds: a bank learnt on past tasks, and stocks made on them, for one seed."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kiridashi_server.amp.scores import ScoreMap
from kiridashi_server.backbone import Backbone
from kiridashi_server.bank.learning import learn_record
from kiridashi_server.bank.record import Record
from kiridashi_server.bank.store import Bank
from kiridashi_server.baselines import Target, l1_plan
from kiridashi_server.graph.plan import Plan
from kiridashi_server.stock.pieces import Piece, Stock, StockMaker, StockSettings, piece_plans
from kiridashi_server.stock.run import server_samples, stock_scores
from kiridashi_server.stock.store import MANIFEST, Making, load_stock, read_manifest, save_stock
from kiridashi_server.tasks import Task, Views

from benchmarks.oneshot_tasks import load_task

STOCK_VIEWS = Views(train=8, val=8)
"""Past tasks have more samples than a new line: per class 16 in two styles and 8 in a third."""


@dataclass(frozen=True)
class Chain:
    """What is learnt from the first tasks of the bank's order, kept in a folder and learnt once.

    Attributes:
        backbone: of all.
        names: the past tasks.
        settings: of both stocks.
        seed: of rendering, learning and making.
        folder: of this code, machine, bank and seed alone.
        fill: puts records that were learnt before into a new bank; by default all are learnt here.
    """

    backbone: Backbone
    names: tuple[str, ...]
    settings: StockSettings
    seed: int
    folder: Path
    fill: Callable[[Path], None] | None = None

    @cached_property
    def records(self) -> list[Record]:
        """One record for each past task."""
        place = self.folder.parent / f"bank-{self.seed}"
        if self.fill and not place.exists():
            self.fill(place)
        with Bank.open(place) as bank:
            known = {record.task: record for record in bank.list(backbone_fingerprint=self.backbone.fingerprint)}
            for name in self.names:
                if name not in known:
                    known[name] = learn_record(self.backbone, load_task(name, seed=self.seed), seed=self.seed)
                    bank.add(known[name])
                    _say(f"learnt {name} in {known[name].provenance.seconds:.1f} s")
        return [known[name] for name in self.names]

    @cached_property
    def mean(self) -> ScoreMap:
        """The mean of the bank's scores."""
        return stock_scores(self.backbone, self.records)

    @cached_property
    def stock(self) -> Stock:
        """Cut by the mean of the bank's scores."""
        return self._made("stock", piece_plans(self.backbone, self.mean, self.settings.shares))

    @cached_property
    def nested_l1(self) -> Stock:
        """The same training of cuts that keep the same share of every group, its filters of largest L1 norm."""
        dense = self.backbone.costs.parameters({})
        samples = self._tasks[0].split("train")
        targets = [Target(samples, 1, int(share * dense), self.seed) for share in self.settings.shares]
        return self._made("nested-l1", [l1_plan(self.backbone, target) for target in targets])

    @cached_property
    def tuned(self) -> Backbone:
        """The whole backbone as the first piece of the stock has it: the control for what tuning alone brings."""
        return dataclasses.replace(self.backbone, program=self.stock.pieces[0].program)

    @property
    def seconds(self) -> dict[str, float]:
        """Of learning the bank, and of making each stock that there is."""
        found = {} if self.fill else {"bank": sum(record.provenance.seconds for record in self.records)}
        kinds = [kind for kind in ("stock", "nested-l1") if (self.folder / kind / MANIFEST).is_file()]
        return {**found, **{kind: read_manifest(self.folder / kind).making.seconds for kind in kinds}}

    @cached_property
    def _tasks(self) -> list[Task]:
        return [load_task(name, seed=self.seed, views=STOCK_VIEWS) for name in self.names]

    def _made(self, kind: str, plans: Sequence[Plan]) -> Stock:
        """The stock of that kind, from the folder or made now."""
        folder = self.folder / kind
        if (folder / MANIFEST).is_file():
            return load_stock(folder, self.backbone)
        start = time.process_time()
        samples = [server_samples(task) for task in self._tasks]
        maker = StockMaker(self.backbone, samples, plans, self.settings, seed=self.seed)
        pieces: list[Piece] = []
        for _ in range(len(maker)):
            pieces.append(maker.piece(pieces))
            _say(f"{kind}: piece {len(pieces)} of {len(plans)} after {time.process_time() - start:.0f} s")
        making = Making(
            tasks={task.name: task.digest for task in self._tasks},
            records=tuple(record.id for record in self.records),
            settings=self.settings,
            seed=self.seed,
            seconds=time.process_time() - start,
        )
        stock = maker.stock(pieces)
        save_stock(folder, stock, self.backbone, making)
        return stock


def chain_folder(root: Path, digest: str, names: Sequence[str], seed: int) -> Path:
    """Where a chain is kept."""
    bank = hashlib.sha256("\0".join(names).encode()).hexdigest()[:8]
    return root / digest[:16] / f"{len(names)}-{bank}-{seed}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
