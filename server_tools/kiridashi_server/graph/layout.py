"""The layout of a program: which groups of units can be cut, under which names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias, cast, get_args

from kiridashi_server.graph.errors import GraphError, PlanError

Kind: TypeAlias = Literal["filter", "head", "node"]
"""Convolution channels, attention heads, or channels of linear layers."""


@dataclass(frozen=True, slots=True)
class Member:
    """An axis of a parameter that runs (also) over a group's units."""

    parameter: str
    axis: int


@dataclass(frozen=True, slots=True)
class Group:
    """Units that are cut together wherever they appear.

    Attributes:
        name: stable and readable: the module of the first weight that makes these channels in a forward pass.
        size: number of units.
        kind: what the units are.
        members: the parameter axes that run over the units, in natural order. An axis may hold more than one
            group, or a group several times: 768 may be 12 heads of 64.
    """

    name: str
    size: int
    kind: Kind
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class Frozen:
    """A parameter axis that no cut changes, and why. Kernel axes of convolutions are not listed."""

    parameter: str
    axis: int
    size: int
    reason: str


@dataclass(frozen=True)
class Layout:
    """All groups of a program in the order of the forward pass, and the axes that are frozen."""

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, sizes, kinds and members; the same for every torch version and every run."""
        groups = sorted(self.groups, key=lambda group: group.name)
        text = json.dumps([_group_json(group) for group in groups], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Number of units by group name."""
        return {group.name: group.size for group in self.groups}

    @cached_property
    def _by_name(self) -> Mapping[str, Group]:
        return {group.name: group for group in self.groups}

    def group(self, name: str) -> Group:
        """The group called ``name``.

        Raises:
            PlanError: there is none.
        """
        try:
            return self._by_name[name]
        except KeyError:
            raise PlanError(
                f"the layout has no group called {name!r}",
                next_step="see Layout.table() for the groups",
            ) from None

    def table(self) -> str:
        """The groups and the frozen axes as text for a terminal."""
        width = max([len("group"), *(len(group.name) for group in self.groups)])
        lines = [f"{'group':<{width}}  {'kind':<6}  {'units':>5}  parameters"]
        lines += [
            f"{group.name:<{width}}  {group.kind:<6}  {group.size:>5}  "
            + str(len({member.parameter for member in group.members}))
            for group in self.groups
        ]
        lines += [f"frozen: {axis.parameter}[{axis.axis}] ({axis.size}): {axis.reason}" for axis in self.frozen]
        return "\n".join(lines)

    def to_json(self) -> str:
        """The layout as JSON text; :meth:`from_json` reads it back."""
        content = {
            "groups": [_group_json(group) for group in self.groups],
            "frozen": [[axis.parameter, axis.axis, axis.size, axis.reason] for axis in self.frozen],
        }
        return json.dumps(content, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """The layout that :meth:`to_json` wrote.

        Raises:
            GraphError: the text is no layout.
        """
        try:
            content = json.loads(text)
            return cls(
                groups=tuple(_group_from_json(group) for group in content["groups"]),
                frozen=tuple(
                    Frozen(str(parameter), int(axis), int(size), str(reason))
                    for parameter, axis, size, reason in content["frozen"]
                ),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise GraphError("the text is no layout", why=f"{type(error).__name__}: {error}") from error


def _group_json(group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "size": group.size,
        "kind": group.kind,
        "members": [[member.parameter, member.axis] for member in group.members],
    }


def _group_from_json(content: Mapping[str, Any]) -> Group:
    if content["kind"] not in get_args(Kind):
        raise ValueError(f"unknown kind {content['kind']!r}")
    members = tuple(Member(str(parameter), int(axis)) for parameter, axis in content["members"])
    return Group(str(content["name"]), int(content["size"]), cast("Kind", content["kind"]), members)
