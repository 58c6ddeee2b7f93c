"""A plan: which units of which groups stay. Data, to be looked at, compared and stored before it is carried out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from kiridashi_server.graph.errors import PlanError
from kiridashi_server.graph.layout import Layout


@dataclass(frozen=True, slots=True)
class Plan:
    """The kept units of every group, as ascending indices, and the digest of the layout they belong to."""

    layout_digest: str
    kept: Mapping[str, tuple[int, ...]]

    @classmethod
    def full(cls, layout: Layout) -> Plan:
        """The plan that keeps everything."""
        return cls.of(layout, {})

    @classmethod
    def of(cls, layout: Layout, kept: Mapping[str, Iterable[int]]) -> Plan:
        """A plan for ``layout`` that keeps these units of these groups, and all other groups whole.

        Raises:
            PlanError: it does not fit the layout.
        """
        whole = {group.name: tuple(range(group.size)) for group in layout.groups}
        chosen = {name: tuple(sorted(int(unit) for unit in units)) for name, units in kept.items()}
        plan = cls(layout.digest, whole | chosen)
        plan.validate(layout)
        return plan

    @property
    def counts(self) -> dict[str, int]:
        """How many units each group keeps."""
        return {name: len(units) for name, units in self.kept.items()}

    def validate(self, layout: Layout) -> None:
        """Check that the plan belongs to ``layout`` and can be carried out on it.

        Raises:
            PlanError: made for another layout; a group is missing, unknown or left without units; or units
                are out of range, repeated or not ascending.
        """
        if self.layout_digest != layout.digest:
            raise PlanError(
                "the plan was made for another layout",
                why=f"its digest is {self.layout_digest[:12]}, the layout's is {layout.digest[:12]}",
                next_step="make the plan anew for this backbone",
            )
        sizes = layout.sizes
        if unknown := sorted(set(self.kept) - set(sizes)):
            raise PlanError(f"the plan names unknown groups: {', '.join(unknown)}", next_step="see Layout.table()")
        if missing := sorted(set(sizes) - set(self.kept)):
            raise PlanError(
                f"the plan says nothing about these groups: {', '.join(missing)}",
                next_step="make it with Plan.of(), which keeps unnamed groups whole",
            )
        for name, units in self.kept.items():
            _check_units(name, units, sizes[name])

    def to_json(self) -> str:
        """The plan as canonical JSON text: equal plans give equal text."""
        kept = {name: list(units) for name, units in self.kept.items()}
        return json.dumps({"layout_digest": self.layout_digest, "kept": kept}, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that :meth:`to_json` wrote; whether it fits a layout is for :meth:`validate` to say.

        Raises:
            PlanError: the text is no plan.
        """
        try:
            content = json.loads(text)
            kept = {str(name): tuple(int(unit) for unit in units) for name, units in content["kept"].items()}
            return cls(str(content["layout_digest"]), kept)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError("the text is no plan", why=f"{type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        return "\n".join(f"{name}: {len(units)} units" for name, units in self.kept.items())


def _check_units(name: str, units: tuple[int, ...], size: int) -> None:
    if not units:
        raise PlanError(
            f"the plan leaves no unit of group {name!r}",
            why="a layer without channels cannot run",
            next_step="keep at least one unit in every group",
        )
    if units[0] < 0 or units[-1] >= size or any(a >= b for a, b in pairwise(units)):
        raise PlanError(
            f"the units that the plan keeps of group {name!r} are not ascending indices below {size}",
            next_step="sort them, name each once, and count from zero",
        )
