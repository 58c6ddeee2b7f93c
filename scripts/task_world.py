"""Draw many small tasks from pools of kindred drawings, and deal them to the roles of a benchmark."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, replace

import msgspec
import numpy as np
from drawing_sources import Sources
from kiridashi_server.tasks.errors import TaskError
from kiridashi_server.tasks.seeding import generator_for
from kiridashi_server.tasks.task import SplitName
from numpy.typing import NDArray

HELD_OUT = "held-out"
_MANY = 1_000


@dataclass(frozen=True)
class TaskSpec:
    """What a task is made of.

    Attributes:
        counts: drawings of every class in each split, from each of the split's styles.
        classes: by label, its pictograms; each a list of the drawings that show it.
        kind: of the styles.
        role, area, pool: see :class:`kiridashi_server.tasks.drawings.TaskRecipe`.
    """

    counts: dict[SplitName, int]
    classes: dict[str, list[list[str]]]
    kind: str = "pictogram"
    role: str = ""
    area: str = ""
    pool: str = ""


class Pool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Kindred drawings: pictograms of some sub-categories, or letters of one script. ``at_most`` counts tasks."""

    name: str
    area: str
    subcategories: list[str] = []
    letters: str = ""
    at_most: int = _MANY


class World(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tasks of ``classes`` classes each, from ``pools``. Tasks that no role of ``roles`` takes are held out.

    ``leave_out`` names pictograms by their short names.
    """

    seed: int
    classes: int
    least_difference: float
    roles: dict[str, int]
    held_out_only: list[str]
    leave_out: list[str]
    pools: list[Pool]


def draw(sources: Sources, world: World) -> dict[str, TaskSpec]:
    """All tasks by name. Within a role their order is random, so the first few of a role are a draw of their own."""
    distinct = Distinct(sources, world.least_difference)
    tasks: dict[str, TaskSpec] = {}
    for pool in world.pools:
        kind = "type" if pool.letters else "pictogram"
        members = letters(pool) if pool.letters else pictograms(sources, pool, world.leave_out)
        order = generator_for(world.seed, "pool", pool.name).permutation(sorted(members)).tolist()
        usable = [label for label in order if distinct.add(kind, members[label])]
        for number in range(min(pool.at_most, len(usable) // world.classes)):
            chosen = usable[number * world.classes : (number + 1) * world.classes]
            classes = {label: [[members[label]]] for label in chosen}
            counts = {split: 1 for style in sources.of_kind(kind) for split in sources.styles[style].splits}
            tasks[f"{pool.name}-{number + 1}"] = TaskSpec(counts, classes, kind, HELD_OUT, pool.area, pool.name)
    return deal_roles(tasks, world)


def pictograms(sources: Sources, pool: Pool, leave_out: list[str]) -> dict[str, str]:
    """Drawings of a pool's pictograms that all styles have, by label; one of each figure."""
    chosen: dict[str, tuple[str, str]] = {}
    for entry in sorted(sources.pictograms, key=lambda entry: entry.sort_order):
        if entry.subcategory not in pool.subcategories or entry.short_name in leave_out:
            continue
        if all(sources.has(style, entry.name) for style in sources.of_kind("pictogram")):
            chosen.setdefault(figure(entry.name), (entry.short_name.replace("_", "-"), entry.name))
    return dict(chosen.values())


def figure(name: str) -> str:
    """What a pictogram shows, without gender and direction.

    A person is U+1F9D1, a man U+1F468, a woman U+1F469, followed by what they are; or a figure of its own is followed
    by U+2642 or U+2640. U+27A1 turns it to the right.
    """
    parts = [part for part in name.split("-") if part not in {"200d", "fe0f", "2640", "2642", "27a1"}]
    if len(parts) > 1 and parts[0] in {"1f468", "1f469"}:
        parts[0] = "1f9d1"
    return "-".join(parts)


def letters(pool: Pool) -> dict[str, str]:
    """A pool's letters by label: ``script-code point``."""
    return {unicodedata.name(letter).split()[-1].lower(): f"{pool.name}-{ord(letter):04x}" for letter in pool.letters}


class Distinct:
    """Drawings that are visibly different from each other in every style."""

    def __init__(self, sources: Sources, least_difference: float) -> None:
        self._sources, self._least = sources, least_difference
        self._looks: dict[str, list[NDArray[np.float64]]] = {}

    def add(self, kind: str, name: str) -> bool:
        """Take a drawing in, unless it differs by less than the least from one that is in."""
        looks = self._looks.setdefault(kind, [])
        look = np.stack([self._sources.look(style, name) for style in self._sources.of_kind(kind)])
        if any(np.sqrt(((look - other) ** 2).mean(axis=1)).min() < self._least for other in looks):
            return False
        looks.append(look)
        return True


def deal_roles(tasks: dict[str, TaskSpec], world: World) -> dict[str, TaskSpec]:
    """Give each task its role: every area gets its share of each role, which of its tasks is left to the draw.

    Areas follow one another, and the next task goes to the role that is furthest behind its share so far.
    """
    areas: dict[str, list[str]] = {}
    for name, task in tasks.items():
        if task.area not in world.held_out_only:
            areas.setdefault(task.area, []).append(name)
    order = [name for area in areas for name in generator_for(world.seed, "area", area).permutation(areas[area])]
    rest = len(order) - sum(world.roles.values())
    if rest < 0:
        raise TaskError(f"{len(order)} tasks are too few for the roles {world.roles}")
    shares = {**world.roles, HELD_OUT: rest}
    given = dict.fromkeys(shares, 0)
    roles: dict[str, str] = {}
    for place, name in enumerate(order, start=1):
        roles[name] = max(shares, key=lambda role: shares[role] * place / len(order) - given[role])
        given[roles[name]] += 1
    shuffled = generator_for(world.seed, "order").permutation(sorted(tasks)).tolist()
    dealt = {name: replace(tasks[name], role=roles.get(name, HELD_OUT)) for name in shuffled}
    return {name: task for role in shares for name, task in dealt.items() if task.role == role}
