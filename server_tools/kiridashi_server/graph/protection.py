"""Which parameters the user wants left alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from kiridashi_server.graph.errors import GraphError


@dataclass(frozen=True, slots=True)
class Protection:
    """Names of modules and parameters, with ``*`` for anything; a module's name stands for all in it."""

    patterns: tuple[str, ...]

    @classmethod
    def of(cls, patterns: Iterable[str], names: Sequence[str]) -> Protection:
        """The protection of ``patterns`` in a program whose tensors have these names.

        Raises:
            GraphError: one of the patterns covers no tensor.
        """
        protection = cls(tuple(patterns))
        for pattern in protection.patterns:
            if not any(_covers(pattern, name) for name in names):
                raise GraphError(
                    f"nothing to protect is called {pattern!r}",
                    why="no parameter that the program reads has this name, or it has another name besides",
                    next_step="name a module such as 'encoder.layer.0' or a parameter; see Layout.table()",
                )
        return protection

    def covers(self, name: str) -> bool:
        """Whether the tensor called ``name`` is to be left alone."""
        return any(_covers(pattern, name) for pattern in self.patterns)


def _covers(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
