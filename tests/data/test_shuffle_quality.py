import numpy as np
import pytest

from data.shuffle_quality import LEAST_QUALITY, measure, quality, random_share

SIZES = [(20, 2), (48, 4), (200, 2), (200, 10), (1000, 100), (20_000, 1000)]


def drawn(samples: int, classes: int) -> np.ndarray:
    return np.sort(np.random.default_rng(0).integers(0, classes, samples))


@pytest.mark.parametrize(("samples", "classes"), SIZES)
def test_a_random_permutation_scores_one(samples, classes):
    rng = np.random.default_rng(1)
    labels = drawn(samples, classes)
    assert {quality(rng.permutation(labels)) for _ in range(50)} == {1.0}


@pytest.mark.parametrize(("samples", "classes"), SIZES[1:])
def test_a_sorted_order_scores_zero(samples, classes):
    assert quality(drawn(samples, classes)) == pytest.approx(0.0, abs=1e-9)
    assert quality(drawn(samples, classes)[::-1].copy()) == pytest.approx(0.0, abs=1e-9)


def through_a_buffer(values: np.ndarray, size: int) -> np.ndarray:
    """Return a sorted stream as a shuffle buffer of about ``size`` samples lets it out."""
    delays = np.random.default_rng(2).integers(0, size, len(values))
    return values[np.argsort(np.arange(len(values)) + delays, kind="stable")]


def test_half_shuffled_orders_lie_in_between_and_in_order():
    labels = drawn(50_000, 500)
    scores = [quality(through_a_buffer(labels, size)) for size in (100, 1000, 5000, 20_000)]
    assert scores == sorted(scores)
    assert 0 < scores[0] < 0.1
    assert 0.3 < scores[2] < 0.7
    assert scores[3] < LEAST_QUALITY


@pytest.mark.parametrize("streams", [2, 8, 12, 31])
def test_interleaved_sorted_streams_are_no_shuffle(streams):
    labels = drawn(50_000, 500)[: 50_000 // streams * streams]
    assert quality(labels.reshape(streams, -1).T.ravel()) < 0.6


def test_pairs_of_one_class_show():
    assert quality(np.repeat(np.random.default_rng(3).integers(0, 500, 25_000), 2)) < LEAST_QUALITY


def test_a_round_robin_is_no_worse_than_random():
    assert quality(np.tile(np.arange(100), 500)) == 1.0


@pytest.mark.parametrize("values", [[], [3], [3, 3, 3, 3], [1, 2, 3, 4]])
def test_where_nothing_can_be_told_the_order_is_as_good_as_any(values):
    assert quality(np.array(values, np.int64)) == 1.0


def test_the_share_of_chance_is_that_of_all_pairs():
    values = np.random.default_rng(4).integers(0, 5, 60)
    pairs = [values[i] == values[j] for i in range(60) for j in range(i)]
    assert random_share(values) == pytest.approx(np.mean(pairs))


def test_the_worse_of_class_and_folder_counts():
    rng = np.random.default_rng(5)
    shuffled, labels = rng.permutation(drawn(4000, 40)), drawn(4000, 40)
    assert measure(shuffled, labels).score == quality(labels) < 0.01
    good = measure(shuffled, shuffled)
    assert good.score == 1.0
    assert good.run == pytest.approx(good.random_run, rel=0.02)
    assert measure(labels, shuffled).run == pytest.approx(100)
