"""Dimensions as products and concatenations of atoms.

A tensor dimension is a product of *atoms* in row-major order: 768 may be ``(12 heads, 64)``. An atom is a
leaf, or a concatenation of dimensions (after ``cat``, before ``split``). Operators state that two dimensions
run over the same things; ``unify`` then makes them share atoms, splitting atoms where one side is finer.
What must not be cut is frozen, with the reason. Leaves left unfrozen at the end are the groups.

Everything that cannot be lined up is frozen: a wrong cut is impossible, a missed one is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt


@dataclass(eq=False, slots=True)
class Atom:
    """One factor of a dimension; compared by identity, changed only by this module's functions.

    Attributes:
        size: how many indices it runs over.
        frozen: why it must not be cut, or empty.
        pieces: for a concatenation, its parts in order.
        stands_for: the dimension that has taken its place after a merge or a split.
    """

    size: int
    frozen: str = ""
    pieces: tuple[Dim, ...] = ()
    stands_for: Dim | None = field(default=None, repr=False)


Dim: TypeAlias = tuple[Atom, ...]
Dims: TypeAlias = list[Dim]

ONE: Dim = ()
"""The dimension of size one."""


def fresh(size: int, frozen: str = "") -> Dim:
    """A new dimension of one atom, related to no other."""
    return ONE if size == 1 else (Atom(size, frozen),)


def resolve(dim: Dim) -> Dim:
    """``dim`` in today's atoms: merges and splits followed, factors of size one dropped."""
    for atom in dim:
        if atom.stands_for is not None or atom.size == 1:
            break
    else:
        return dim
    found: list[Atom] = []
    for atom in dim:
        if atom.stands_for is not None:
            atom.stands_for = resolve(atom.stands_for)  # the next one to ask has a shorter way
            found.extend(atom.stands_for)
        elif atom.size != 1:
            found.append(atom)
    return tuple(found)


def size_of(dim: Dim) -> int:
    """How many indices ``dim`` runs over."""
    size = 1
    for atom in dim:
        size *= atom.size
    return size


def leaves(dim: Dim) -> Iterator[Atom]:
    """All leaf atoms of ``dim``, through products and concatenations, with repetitions."""
    for atom in resolve(dim):
        if atom.pieces:
            for piece in atom.pieces:
                yield from leaves(piece)
        else:
            yield atom


def is_frozen(dim: Dim) -> bool:
    """Whether nothing in ``dim`` may be cut."""
    return all(all(map(is_frozen, atom.pieces)) if atom.pieces else atom.frozen for atom in resolve(dim))


def reason_of(dim: Dim) -> str:
    """The first reason found for which a frozen ``dim`` is frozen."""
    return next((atom.frozen for atom in leaves(dim) if atom.frozen), "")


def freeze(dim: Dim, reason: str) -> None:
    """Forbid cutting anything in ``dim``; a reason given earlier stays."""
    for atom in resolve(dim):
        for piece in atom.pieces:
            freeze(piece, reason)
        # Nothing inside can be cut any more, so the structure is not needed and must not hinder a split.
        atom.pieces = ()
        atom.frozen = atom.frozen or reason


def freeze_all(dims: Sequence[Dim], reason: str) -> None:
    """:func:`freeze` each of ``dims``."""
    for dim in dims:
        freeze(dim, reason)


def broadcast(operands: Sequence[Dims]) -> Dims:
    """Dimensions of an elementwise result: aligned at the end, those of size one give way to the others."""
    rank = max(len(dims) for dims in operands)
    result: Dims = [ONE] * rank
    for dims in operands:
        for axis, dim in enumerate(dims, start=rank - len(dims)):
            if size_of(result[axis]) == 1:
                result[axis] = dim
            elif size_of(dim) != 1:
                unify(result[axis], dim)
    return result


def concatenate(dims: Sequence[Dim]) -> Dim:
    """The dimension that runs over ``dims`` one after the other."""
    if len(dims) == 1:
        return dims[0]
    total = sum(size_of(dim) for dim in dims)
    if all(is_frozen(dim) for dim in dims):
        return fresh(total, next((reason for reason in map(reason_of, dims) if reason), "concatenated"))
    pieces: list[Dim] = []
    for dim in dims:
        atoms = resolve(dim)
        nested = len(atoms) == 1 and atoms[0].pieces
        pieces.extend(nested or (atoms,))
    return (Atom(total, pieces=tuple(pieces)),)


def unify(first: Dim, second: Dim) -> None:
    """State that index ``i`` of ``first`` is the same thing as index ``i`` of ``second``."""
    left, right = resolve(first), resolve(second)
    if size_of(left) != size_of(right):
        freeze(left + right, "sizes differ")
        return
    while left and right:
        a, b = left[0], right[0]
        if a is b or a.size == b.size:
            _merge(a, b)
            left, right = left[1:], right[1:]
        elif _can_split(a, b.size):
            _split(a, b.size)
        elif _can_split(b, a.size):
            _split(b, a.size)
        else:
            freeze(left + right, "factors do not line up")
            return
        left, right = resolve(left), resolve(right)


def regroup(dims: Sequence[Dim], sizes: Sequence[int]) -> Dims | None:
    """The dimensions of a row-major reshape of ``dims`` to ``sizes``.

    Returns None, everything frozen, when the new borders cut through an atom that cannot be split.
    """
    rest = resolve(tuple(atom for dim in dims for atom in dim))
    regrouped: Dims = []
    for size in sizes:
        taken: list[Atom] = []
        need = size
        while need > 1 and rest:
            atom = rest[0]
            if need % atom.size == 0:
                taken.append(atom)
                need //= atom.size
                rest = rest[1:]
            elif _can_split(atom, need):
                _split(atom, need)
                rest = resolve(rest)
            else:
                break
        if need != 1:
            freeze_all(dims, "reshape across its factors")
            return None
        regrouped.append(tuple(taken))
    return regrouped


def _can_split(atom: Atom, lead: int) -> bool:
    return not atom.pieces and atom.size > lead and atom.size % lead == 0


def _split(atom: Atom, lead: int) -> None:
    atom.stands_for = (Atom(lead, atom.frozen), Atom(atom.size // lead, atom.frozen))


def _merge(a: Atom, b: Atom) -> None:
    """Make two atoms of equal size one; concatenations must agree piece by piece."""
    if a is b:
        return
    reason = a.frozen or b.frozen
    if a.pieces and b.pieces:
        if [size_of(piece) for piece in a.pieces] == [size_of(piece) for piece in b.pieces]:
            for mine, other in zip(a.pieces, b.pieces, strict=True):
                unify(mine, other)
        else:
            reason = reason or "concatenations of different parts"
            freeze((a, b), reason)
    stays, goes = (b, a) if b.pieces and not a.pieces else (a, b)
    goes.stands_for = (stays,)
    if reason:
        freeze((stays,), reason)


def count(dim: Dim, kept: Mapping[Atom, int]) -> int:
    """The size of ``dim`` when each atom in ``kept`` has that many indices left."""
    number = 1
    for atom in resolve(dim):
        number *= sum(count(piece, kept) for piece in atom.pieces) if atom.pieces else kept.get(atom, atom.size)
    return number


def indices(dim: Dim, kept: Mapping[Atom, npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """The indices of ``dim`` that stay when each atom in ``kept`` keeps only those named; ascending."""
    found = np.zeros(1, dtype=np.int64)
    for atom in resolve(dim):
        if atom.pieces:
            starts = np.cumsum([0, *(size_of(piece) for piece in atom.pieces)])
            local = np.concatenate(
                [start + indices(piece, kept) for start, piece in zip(starts, atom.pieces, strict=False)]
            )
        else:
            local = kept.get(atom, np.arange(atom.size, dtype=np.int64))
        found = (found[:, None] * atom.size + local[None, :]).reshape(-1)
    return found


def units_along(dim: Dim, atom: Atom) -> npt.NDArray[np.int64]:
    """Which unit of ``atom`` each index of ``dim`` belongs to, int64 [size of ``dim``]; -1 where it belongs to none."""
    found = np.full(1, -1, dtype=np.int64)
    for part in resolve(dim):
        if part.pieces:
            local = np.concatenate([units_along(piece, atom) for piece in part.pieces])
        elif part is atom:
            local = np.arange(part.size, dtype=np.int64)
        else:
            local = np.full(part.size, -1, dtype=np.int64)
        found = np.where(local >= 0, local, found[:, None]).reshape(-1)
    return found
