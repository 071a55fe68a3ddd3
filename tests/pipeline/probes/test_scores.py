"""Counting hits, by hand and against statsmodels' published figures."""

import pytest
import torch

from pipeline.probes.scores import Scores


def test_hits_by_hand() -> None:
    ranking = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 0, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 1, 0, 3, 4, 5]])
    scores = Scores.of(ranking, torch.tensor([0, 0, 0, -1]), classes=6)
    # The first is right, the second among five, the third sixth, the fourth does not count.
    assert (scores.top1, scores.top5) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert scores.per_class == [pytest.approx(1 / 3), None, None, None, None, None]
    twice = scores + scores
    assert (twice.top1, int(twice.samples.sum())) == (scores.top1, 6)


def test_fewer_classes_than_five() -> None:
    scores = Scores.of(torch.tensor([[1, 0], [0, 1]]), torch.tensor([1, 1]), classes=2)
    assert (scores.top1, scores.top5) == (0.5, 1.0)


@pytest.mark.parametrize(
    ("hits", "samples", "low", "high"),
    # Newcombe, 1998, Table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_wilsons(hits: int, samples: int, low: float, high: float) -> None:
    counts = torch.tensor([samples]), torch.tensor([hits]), torch.tensor([hits])
    assert Scores(*counts).interval == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))
