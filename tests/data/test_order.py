"""The order is a permutation per epoch and a pure function of (seed, place)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import FixedOrder, ShuffledOrder, hashed, uniforms

shard_counts = st.lists(st.integers(0, 12), min_size=1, max_size=9).filter(sum)


def epoch_ids(order: ShuffledOrder, epoch: int) -> list[int]:
    start = epoch * len(order)
    return order.place(np.arange(start, start + len(order)))[1].tolist()


def test_hash_is_the_published_splitmix64() -> None:
    # The first outputs of splitmix64 from the state 1234567, as listed by the reference implementation.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    drawn = uniforms(np.array([1234567], np.uint64), 3)[0]
    assert drawn.tolist() == [(value >> 11) * 2.0**-53 for value in published]


def test_hash_depends_on_every_word_and_its_place() -> None:
    keys = {int(hashed(*words)[0]) for words in [(1, 2, 3), (1, 3, 2), (0, 2, 3), (1, 2), (1, 2, -3), (1 << 70,)]}
    assert len(keys) == 6


@given(counts=shard_counts, seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_every_epoch_is_a_permutation(counts: list[int], seed: int, epoch: int) -> None:
    assert sorted(epoch_ids(ShuffledOrder(counts, seed), epoch)) == list(range(sum(counts)))


def test_epochs_and_seeds_differ() -> None:
    counts = [10] * 20
    orders = [epoch_ids(ShuffledOrder(counts, seed), epoch) for seed in (0, 1, 2**64 - 1) for epoch in range(3)]
    for k, order in enumerate(orders):
        for other in orders[:k]:
            # Two independent permutations of 200 agree in about one place.
            assert np.sum(np.equal(order, other)) < 10


@given(
    counts=shard_counts,
    seed=st.integers(0, 5),
    start=st.integers(0, 200),
    batch=st.integers(1, 60),
    ranks=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_any_start_batch_and_ranks_give_the_same_sequence(
    counts: list[int], seed: int, start: int, batch: int, ranks: int
) -> None:
    whole = ShuffledOrder(counts, seed).place(np.arange(start + 2 * batch * ranks))
    orders = [ShuffledOrder(counts, seed) for _ in range(ranks)]
    for step in range(2):
        for rank, order in enumerate(orders):
            first = start + (step * ranks + rank) * batch
            epoch, sample = order.place(np.arange(first, first + batch))
            assert epoch.tolist() == whole[0][first : first + batch].tolist()
            assert sample.tolist() == whole[1][first : first + batch].tolist()


@pytest.mark.parametrize("window", [1, 3])
def test_samples_stay_within_their_window_of_shards(window: int) -> None:
    counts = [5] * 9
    order = ShuffledOrder(counts, seed=3, window=window)
    shards = np.repeat(np.arange(9), counts)[epoch_ids(order, 0)]
    windows = [set(shards[k : k + 5 * window].tolist()) for k in range(0, 45, 5 * window)]
    assert [len(each) for each in windows] == [window] * (9 // window)
    assert set.union(*windows) == set(range(9))


def test_a_window_is_mixed_and_shards_move() -> None:
    order = ShuffledOrder([100] * 32, seed=0)
    ids = np.array(epoch_ids(order, 0))
    shards = ids[:1600] // 100
    assert len(set(shards.tolist())) == 16
    # Well mixed: every quarter of the window holds samples of all its shards.
    assert all(len(set(shards[k : k + 400].tolist())) == 16 for k in range(0, 1600, 400))
    assert set(shards.tolist()) != set((np.array(epoch_ids(order, 1))[:1600] // 100).tolist())


def test_only_two_epochs_are_kept() -> None:
    order = ShuffledOrder([7, 6], seed=0)
    epoch, sample = order.place(np.arange(13 * 5))
    assert epoch.tolist() == [k // 13 for k in range(65)]
    assert sample[26:39].tolist() == epoch_ids(ShuffledOrder([7, 6], seed=0), 2)
    assert sorted(order._permutations) == [3, 4]


def test_the_order_is_pinned() -> None:
    """A change of these numbers breaks the resume of every run under way."""
    assert epoch_ids(ShuffledOrder([4, 4, 3], seed=7, window=2), 1) == [9, 3, 2, 0, 8, 10, 1, 6, 4, 7, 5]


def test_fixed_order_gives_ids_once_in_epoch_zero() -> None:
    order = FixedOrder([5, 3, 3, 9])
    epoch, sample = order.place(np.arange(1, 4))
    assert len(order) == 4
    assert epoch.tolist() == [0, 0, 0]
    assert sample.tolist() == [3, 3, 9]
