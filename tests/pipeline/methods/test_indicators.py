"""Indicators of a collapse on features whose spread is known."""

import math

import pytest
import torch

from pipeline.methods.indicators import entropy_ratio, spread


def test_equal_features_have_collapsed() -> None:
    seen = spread(torch.ones(16, 8))
    assert float(seen["feature_std"]) == pytest.approx(0, abs=1e-6)


def test_uniform_directions_are_spread_over_every_dimension() -> None:
    torch.manual_seed(0)
    seen = spread(torch.randn(20_000, 8))
    assert float(seen["feature_std"]) == pytest.approx(1, abs=0.01)
    assert float(seen["effective_rank"]) == pytest.approx(8, abs=0.02)


@pytest.mark.parametrize("rows", [6, 40])
def test_the_effective_rank_is_the_eigenvalues_participation_ratio(rows: int) -> None:
    torch.manual_seed(0)
    features = torch.randn(rows, 12, dtype=torch.float64) * torch.arange(1, 13)
    unit = features / features.norm(dim=1, keepdim=True)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(unit.T, correction=0))
    want = eigenvalues.sum() ** 2 / eigenvalues.square().sum()
    assert float(spread(features)["effective_rank"]) == pytest.approx(float(want), rel=1e-9)


def test_features_on_a_line_have_rank_one() -> None:
    angles = torch.linspace(0, 0.01, 9, dtype=torch.float64)
    arc = torch.stack([angles.cos(), angles.sin(), torch.zeros(9)], 1)
    assert float(spread(arc)["effective_rank"]) == pytest.approx(1, abs=1e-3)


def test_entropy_ratio_between_one_hot_and_uniform() -> None:
    assert float(entropy_ratio(torch.eye(4))) == 0
    assert float(entropy_ratio(torch.full((3, 5), 0.2))) == pytest.approx(1)
    assert float(entropy_ratio(torch.tensor([[0.5, 0.5, 0, 0]]))) == pytest.approx(math.log(2) / math.log(4))
