"""Dealing images to splits."""

from hypothesis import given
from hypothesis import strategies as st
from kiridashi_server.tasks import SHARES, SPLITS
from kiridashi_server.tasks.splitting import deal_splits


@given(sizes=st.lists(st.integers(5, 120), min_size=1, max_size=4), seed=st.integers(0, 2**64))
def test_every_image_is_dealt_once_and_shares_are_kept(sizes: list[int], seed: int) -> None:
    source_of = {f"c{c}/{i}": f"c{c}/{i}" for c, size in enumerate(sizes) for i in range(size)}
    splits = deal_splits(source_of, seed)
    dealt = [path for paths in splits.values() for path in paths]
    assert sorted(dealt) == sorted(source_of)
    for number, size in enumerate(sizes):
        for name in SPLITS:
            count = sum(path.startswith(f"c{number}/") for path in splits[name])
            assert count >= 1
            assert abs(count - SHARES[name] * size) < 2


@given(seed=st.integers(0, 2**64))
def test_a_class_is_dealt_alike_whatever_other_classes_there_are(seed: int) -> None:
    alone = {f"a/{i}": f"a/{i}" for i in range(9)}
    both = alone | {f"b/{i}": f"b/{i}" for i in range(7)}
    dealt_alone, dealt_both = deal_splits(alone, seed), deal_splits(both, seed)
    for name in SPLITS:
        assert dealt_alone[name] == [path for path in dealt_both[name] if path.startswith("a/")]
