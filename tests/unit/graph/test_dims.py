"""Dimensions: what unify, regroup and concatenate state, checked against real arrays."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from kiridashi_server.graph.dims import (
    ONE,
    Atom,
    Dim,
    broadcast,
    concatenate,
    count,
    freeze,
    fresh,
    indices,
    is_frozen,
    leaves,
    reason_of,
    regroup,
    resolve,
    size_of,
    unify,
)


def only(dim: Dim) -> Atom:
    (atom,) = resolve(dim)
    return atom


def test_equal_sizes_become_one_atom() -> None:
    a, b, c = fresh(6), fresh(6), fresh(6)
    unify(a, b)
    unify(b, c)
    assert only(a) is only(b) is only(c)


def test_a_coarse_dimension_takes_the_factors_of_a_finer_one() -> None:
    heads, size = fresh(4), fresh(3)
    fused = fresh(12)
    unify(fused, heads + size)
    assert resolve(fused) == resolve(heads) + resolve(size)


def test_factors_split_until_they_line_up() -> None:
    left, right = fresh(2) + fresh(6), fresh(4) + fresh(3)
    unify(left, right)
    assert [atom.size for atom in resolve(left)] == [2, 2, 3]
    assert resolve(left) == resolve(right)
    assert not is_frozen(left)


def test_factors_without_a_common_border_are_frozen() -> None:
    left, right = fresh(4) + fresh(9), fresh(6) + fresh(6)
    unify(left, right)
    assert is_frozen(left)
    assert is_frozen(right)
    assert reason_of(left) == "factors do not line up"


def test_different_sizes_are_frozen() -> None:
    left, right = fresh(4), fresh(6)
    unify(left, right)
    assert reason_of(left) == reason_of(right) == "sizes differ"


def test_freezing_reaches_everything_unified_before_and_after() -> None:
    a, b, c = fresh(6), fresh(6), fresh(6)
    unify(a, b)
    freeze(a, "output")
    unify(c, b)
    assert [reason_of(dim) for dim in (a, b, c)] == ["output"] * 3


def test_freezing_part_of_a_product_leaves_the_other_factor() -> None:
    fused, heads, size = fresh(12), fresh(4), fresh(3, "scale")
    unify(fused, heads + size)
    assert [bool(atom.frozen) for atom in leaves(fused)] == [False, True]


def test_concatenations_meet_piece_by_piece() -> None:
    first, second = [fresh(2), fresh(3)], [fresh(2), fresh(3)]
    unify(concatenate(first), concatenate(second))
    assert only(first[0]) is only(second[0])
    assert only(first[1]) is only(second[1])


def test_concatenations_of_different_parts_are_frozen() -> None:
    first, second = [fresh(2), fresh(3)], [fresh(3), fresh(2)]
    unify(concatenate(first), concatenate(second))
    assert all(is_frozen(piece) for piece in first + second)


def test_a_concatenation_cannot_be_reshaped_across() -> None:
    pieces = [fresh(2), fresh(4)]
    assert regroup([concatenate(pieces)], [2, 3]) is None
    assert all(is_frozen(piece) for piece in pieces)


def test_nested_concatenations_are_flat() -> None:
    a, b, c = fresh(2), fresh(3), fresh(4)
    nested = concatenate([concatenate([a, b]), c])
    assert [size_of(piece) for piece in only(nested).pieces] == [2, 3, 4]


def test_broadcast_takes_the_larger_dimension_and_unifies_equal_ones() -> None:
    a, b = [fresh(5), ONE], [fresh(2), fresh(5), fresh(7)]
    result = broadcast([a, b])
    assert [size_of(dim) for dim in result] == [2, 5, 7]
    assert only(a[0]) is only(b[1])


@st.composite
def factorings(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two shapes of the same number of elements that share all their borders with a list of factors."""
    factors = draw(st.lists(st.sampled_from([2, 3, 4, 5]), min_size=1, max_size=5))

    def joined() -> list[int]:
        sizes, current = [], 1
        for factor in factors:
            current *= factor
            if draw(st.booleans()):
                sizes.append(current)
                current = 1
        return [*sizes, current]

    return joined(), joined()


@given(factorings(), st.data())
def test_indices_follow_a_reshape(shapes: tuple[list[int], list[int]], data: st.DataObject) -> None:
    """Cutting atoms and then reshaping gives the same elements as reshaping and then cutting."""
    before, after = shapes
    dims = [fresh(size) for size in before]
    regrouped = regroup(dims, after)
    if regrouped is None:
        return
    atoms = {atom for dim in dims for atom in leaves(dim)}
    kept = {
        atom: np.array(sorted(data.draw(st.sets(st.integers(0, atom.size - 1), min_size=1))), dtype=np.int64)
        for atom in sorted(atoms, key=lambda atom: atom.size)
    }
    labels = np.arange(int(np.prod(before)))
    first = labels.reshape(before)[np.ix_(*(indices(dim, kept) for dim in dims))]
    second = labels.reshape(after)[np.ix_(*(indices(dim, kept) for dim in regrouped))]
    np.testing.assert_array_equal(first.reshape(-1), second.reshape(-1))
    counts = {atom: len(units) for atom, units in kept.items()}
    assert [count(dim, counts) for dim in regrouped] == list(second.shape)


def test_indices_of_a_concatenation_are_offset() -> None:
    a, b = fresh(3), fresh(4)
    joined = concatenate([a, b])
    kept = {only(a): np.array([0, 2]), only(b): np.array([1])}
    assert indices(joined, kept).tolist() == [0, 2, 4]
