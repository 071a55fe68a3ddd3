"""The order is a permutation per epoch and a pure function of (seed, place)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from data.order import FixedOrder, ShuffledOrder, SubsetOrder, hashed, held_out, uniforms

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


@pytest.mark.parametrize(
    ("shards", "lanes", "window"), [(1, 1, 32), (7, 1, 32), (8, 2, 16), (20, 4, 8), (100, 16, 2), (1281, 64, 2)]
)
def test_lanes_grow_with_the_shards(shards: int, lanes: int, window: int) -> None:
    order = ShuffledOrder([3] * shards, seed=0)
    assert (order.lanes, order.window) == (lanes, window)


@pytest.mark.parametrize("ranks", [1, 4, 16, 32])
def test_a_rank_reads_few_shards_at_a_time(ranks: int) -> None:
    """With 16 lanes of 10 uneven shards: as many windows of two shards as a rank has lanes, cut at both ends."""
    counts = np.random.default_rng(0).integers(80, 120, 160)
    order = ShuffledOrder(counts.tolist(), seed=3)
    shard_of_sample = np.repeat(np.arange(160), counts)
    shards = shard_of_sample[order.permutation(0)][1 % ranks :: ranks]
    lanes = max(1, 16 // ranks)
    for moment in range(0, len(shards), len(shards) // 40):
        near = shards[moment : moment + len(shards) // 200]
        assert len(set(near.tolist())) <= 2 * lanes * order.window
    assert len(set(shards.tolist())) <= lanes * 12


def test_a_lane_goes_from_window_to_window() -> None:
    order = ShuffledOrder([50] * 64, seed=1)
    shards = order.permutation(2)[3 :: order.lanes] // 50
    windows = [set(shards[k : k + 100].tolist()) for k in range(0, 200, 100)]
    assert [len(window) for window in windows] == [2, 2]
    assert not windows[0] & windows[1]
    # Well mixed: every quarter of a window holds samples of both of its shards.
    assert all(len(set(shards[k : k + 25].tolist())) == 2 for k in range(0, 100, 25))


def test_windows_begin_where_their_lane_does() -> None:
    """Eight lanes of 7.5 shards, windows of four: an odd lane's first one is half a shard and three whole ones."""
    order = ShuffledOrder([50] * 60, seed=1)
    shards = order.permutation(0) // 50
    for lane in range(8):
        first = shards[lane::8][:150]
        assert len(set(first.tolist())) == order.window == 4


@pytest.mark.parametrize("samples", [2, 10, 70, 640])
def test_small_sets_are_mixed_evenly(samples: int) -> None:
    """Over epochs, every sample is everywhere: its mean position lies around the middle, within 5 sigma."""
    order = ShuffledOrder([samples - samples // 2, samples // 2], seed=0)
    positions = np.array([np.argsort(order.permutation(epoch)) for epoch in range(200)])
    sigma = np.sqrt((samples**2 - 1) / 12 / 200)
    assert np.abs(positions.mean(axis=0) - (samples - 1) / 2).max() < 5 * sigma


def test_epochs_move_the_shards() -> None:
    order = ShuffledOrder([50] * 64, seed=1)
    first, second = (set((order.permutation(epoch)[:1600] // 50).tolist()) for epoch in (0, 1))
    assert first != second


@given(counts=shard_counts, ranks=st.integers(1, 9), start=st.integers(0, 99), sizes=st.lists(st.integers(1, 40)))
@settings(max_examples=60, deadline=None)
def test_ranks_of_any_number_read_every_place_once(counts: list[int], ranks: int, start: int, sizes: list[int]) -> None:
    """Lives of different batch sizes, one after the other: nothing repeated, nothing skipped."""
    order, seen = ShuffledOrder(counts, seed=4), []
    for size in sizes:
        seen += [start + place for rank in range(ranks) for place in range(rank, size, ranks)]
        start += size
    assert sorted(seen) == list(range(start - sum(sizes), start))
    epoch, sample = order.place(np.array(sorted(seen), np.int64))
    keys = list(zip(epoch.tolist(), sample.tolist(), strict=True))
    assert len(set(keys)) == len(keys)


def test_only_two_epochs_are_kept() -> None:
    order = ShuffledOrder([7, 6], seed=0)
    epoch, sample = order.place(np.arange(13 * 5))
    assert epoch.tolist() == [k // 13 for k in range(65)]
    assert sample[26:39].tolist() == epoch_ids(ShuffledOrder([7, 6], seed=0), 2)
    assert sorted(order._permutations) == [3, 4]


def test_the_order_is_pinned() -> None:
    """A change of these numbers breaks the resume of every run under way."""
    assert epoch_ids(ShuffledOrder([4, 4, 3, 1, 5, 2, 2, 3], seed=7), 1) == [
        9,
        20,
        14,
        17,
        13,
        22,
        3,
        6,
        15,
        16,
        2,
        4,
        0,
        19,
        8,
        7,
        12,
        18,
        10,
        23,
        11,
        5,
        1,
        21,
    ]


def test_fixed_order_gives_ids_once_in_epoch_zero() -> None:
    order = FixedOrder([5, 3, 3, 9])
    epoch, sample = order.place(np.arange(1, 4))
    assert len(order) == 4
    assert epoch.tolist() == [0, 0, 0]
    assert sample.tolist() == [3, 3, 9]


@given(samples=st.integers(0, 300), share=st.floats(0, 1, exclude_max=True), more=st.floats(0, 1, exclude_max=True))
@settings(max_examples=80, deadline=None)
def test_what_is_held_out_and_what_is_learned_are_the_whole_set(samples: int, share: float, more: float) -> None:
    learned, held = held_out(samples, share)
    assert len(held) == int(samples * share)
    assert sorted([*learned, *held]) == list(range(samples))
    # What a growing share holds out stays held out.
    assert set(held.tolist()) <= set(held_out(samples, max(share, more))[1].tolist())


def test_nothing_or_nearly_everything_is_held_out() -> None:
    assert [len(ids) for ids in held_out(1000, 0.0)] == [1000, 0]
    assert [len(ids) for ids in held_out(1000, 0.9999)] == [1, 999]
    for samples in (1, 48, 1024, 50_000):
        assert len(held_out(samples, np.nextafter(1, 0))[0]) == 1


def test_what_is_held_out_lies_everywhere_in_the_set_and_in_an_epoch() -> None:
    samples = 20_000
    ids = held_out(samples, 0.1)[1]
    places = np.argsort(ShuffledOrder([100] * 200, seed=0).permutation(0))[ids]
    for positions in (ids, places):
        assert kstest(positions / samples, "uniform").pvalue > 1e-3
    assert kstest(ids[:200] / samples, "uniform").pvalue > 1e-3
    # In a random order too.
    assert abs(np.corrcoef(ids, np.arange(len(ids)))[0, 1]) < 4 / np.sqrt(len(ids))


def test_what_is_held_out_is_pinned() -> None:
    """After a change of these numbers, a run under way would learn from what it is judged on."""
    assert held_out(12, 0.25)[1].tolist() == [9, 5, 4]


@given(counts=shard_counts, seed=st.integers(0, 5), share=st.floats(0, 0.9), start=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_subset_is_the_shuffled_order_without_the_others(
    counts: list[int], seed: int, share: float, start: int
) -> None:
    ids = held_out(sum(counts), share)[0]
    order, whole = SubsetOrder(ShuffledOrder(counts, seed), ids), ShuffledOrder(counts, seed)
    assert len(order) == len(ids)
    epochs = (start + 50) // len(ids) + 1
    places = [(epoch, sample) for epoch in range(epochs) for sample in epoch_ids(whole, epoch) if sample in ids]
    epoch, sample = order.place(np.arange(start, start + 50))
    assert list(zip(epoch.tolist(), sample.tolist(), strict=True)) == places[start : start + 50]
