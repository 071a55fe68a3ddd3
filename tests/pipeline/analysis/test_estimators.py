"""Bias, variance and CA-MSE of gradients whose distribution is known, and what the intervals promise."""

import statistics
from functools import cache

import pytest
import torch
from torch import Tensor

from pipeline.analysis import estimators
from pipeline.analysis.estimators import Moments, PairedGradients, Sketch, standard_error

CPU = torch.device("cpu")
SEEDS = 200
SUB_BATCHES, SUB_BATCH, DIMENSIONS = 16, 32, 24
COST_SHARE = 0.01


class Quadratic:
    """The loss |theta - x|^2 / 2, x normal around 0 with covariance S, at theta; compression scales and shifts it."""

    def __init__(self, shift: float = 0.05) -> None:
        self.theta = torch.linspace(-0.2, 0.3, DIMENSIONS, dtype=torch.float64)
        self.scales = torch.linspace(0.5, 1.5, DIMENSIONS, dtype=torch.float64)
        self.bias = shift * torch.cos(torch.arange(DIMENSIONS, dtype=torch.float64))

    def sub_batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the mean gradients of the same samples, whole and compressed."""
        noise = torch.randn(SUB_BATCH, DIMENSIONS, generator=generator, dtype=torch.float64) * self.scales
        own = 0.5 * torch.randn(SUB_BATCH, DIMENSIONS, generator=generator, dtype=torch.float64)
        return (self.theta - noise).mean(0), (self.theta - 0.8 * noise + own + self.bias).mean(0)

    @property
    def squared_bias(self) -> float:
        return float(self.bias.square().sum())

    @property
    def variance(self) -> float:
        return float((0.64 * self.scales.square() + 0.25).sum())

    @property
    def ca_mse(self) -> float:
        return self.squared_bias + COST_SHARE * self.variance


def measured(problem: Quadratic, seed: int) -> PairedGradients:
    generator = torch.Generator().manual_seed(seed)
    pairs = PairedGradients(1, DIMENSIONS, seed=seed, device=CPU, storage=CPU)
    for _ in range(SUB_BATCHES):
        whole, compressed = problem.sub_batch(generator)
        pairs.start(whole.float())
        pairs.add(0, compressed.float())
    return pairs


def estimates(pairs: PairedGradients) -> dict[str, tuple[float, float]]:
    """Return each estimate and its standard error."""
    difference, gradient = pairs.differences(0), pairs.gradients(0)
    bias, variance = difference.squared_expectation_without(), SUB_BATCH * gradient.variance_without()
    found = difference.squared_expectation(), SUB_BATCH * gradient.variance()
    return {
        "squared_bias": (found[0], standard_error(bias)),
        "variance": (found[1], standard_error(variance)),
        "ca_mse": (found[0] + COST_SHARE * found[1], standard_error(bias + COST_SHARE * variance)),
    }


@cache
def over_seeds(shift: float) -> list[dict[str, tuple[float, float]]]:
    """Return the estimates of one problem at every seed."""
    return [estimates(measured(Quadratic(shift), seed)) for seed in range(SEEDS)]


@pytest.mark.parametrize("shift", [0.05, 0.0])
@pytest.mark.parametrize("name", ["squared_bias", "variance", "ca_mse"])
def test_estimates_are_unbiased_and_their_intervals_cover(name: str, shift: float) -> None:
    problem = Quadratic(shift)
    truth = getattr(problem, name)
    found = [each[name] for each in over_seeds(shift)]
    values = [value for value, _ in found]
    # Of a mean over 200 seeds: four of its own standard errors.
    assert abs(statistics.mean(values) - truth) < 4 * statistics.stdev(values) / SEEDS**0.5
    # Student's t at 15 degrees of freedom; 95 % are promised, binomial noise and the jackknife's own take some.
    covered = statistics.mean(abs(value - truth) < 2.13 * error for value, error in found)
    assert covered > 0.88
    # And they are no wider than they must be: the jackknife is somewhat wide where there is no bias.
    assert statistics.mean(error for _, error in found) < 2 * statistics.stdev(values)


def test_the_plug_in_estimate_is_too_high_and_the_other_is_not() -> None:
    problem = Quadratic()
    moments = [measured(problem, seed).differences(0) for seed in range(SEEDS)]
    # Var(d) of a sub-batch over their number: d = 0.2 noise + own + bias.
    excess = float((0.04 * problem.scales.square() + 0.25).sum()) / SUB_BATCH / SUB_BATCHES
    plug_in = statistics.mean(m.squared_mean() for m in moments) - problem.squared_bias
    assert plug_in == pytest.approx(excess, rel=0.1)
    assert abs(statistics.mean(m.squared_expectation() for m in moments) - problem.squared_bias) < 0.1 * excess


def brute_force(vectors: Tensor) -> tuple[float, float]:
    """Return the mean of v_i . v_j over i != j, and the sample variance, by definition."""
    count = len(vectors)
    products = [float(vectors[i] @ vectors[j]) for i in range(count) for j in range(count) if i != j]
    return statistics.mean(products), float((vectors - vectors.mean(0)).square().sum() / (count - 1))


def moments_of(vectors: Tensor) -> Moments:
    pairs = PairedGradients(1, vectors.shape[1], seed=0, device=CPU, storage=CPU)
    for vector in vectors:
        pairs.start(torch.zeros_like(vector))
        pairs.add(0, vector)
    return pairs.differences(0)


def test_running_sums_give_what_all_vectors_together_give() -> None:
    vectors = torch.randn(7, 50, generator=torch.Generator().manual_seed(1)) + 0.3
    moments, exact = moments_of(vectors), vectors.double()
    assert (moments.squared_expectation(), moments.variance()) == pytest.approx(brute_force(exact), rel=1e-6)
    for left_out in range(7):
        rest = torch.cat([exact[:left_out], exact[left_out + 1 :]])
        without = moments.squared_expectation_without()[left_out], moments.variance_without()[left_out]
        assert tuple(map(float, without)) == pytest.approx(brute_force(rest), rel=1e-5)


def test_sketches_estimate_the_errors_of_vectors_longer_than_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    # Gradients' noise has a few strong directions; the sketch is 40 times shorter than the vectors.
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(20, 40_000, generator=generator) / 40_000**0.5
    vectors = torch.randn(24, 20, generator=generator) @ directions + 0.3 * directions[0]
    exact = standard_error(moments_of_exactly(vectors).squared_expectation_without())
    monkeypatch.setattr(estimators, "SKETCH_SIZE", 1000)
    assert standard_error(moments_of(vectors).squared_expectation_without()) == pytest.approx(exact, rel=0.25)


def moments_of_exactly(vectors: Tensor) -> Moments:
    exact = vectors.double()
    total, mean = exact.sum(0), exact.mean(0)
    deviations = exact - mean
    return Moments(float(total @ total), float(exact.square().sum()), deviations @ mean, deviations.square().sum(1))


def test_a_sketch_keeps_inner_products_on_average_and_short_vectors_exactly() -> None:
    one, other = torch.randn(2, 10_000, generator=torch.Generator().manual_seed(2))
    other = other + one
    products = [float(Sketch(10_000, s, CPU)(one) @ Sketch(10_000, s, CPU)(other)) for s in range(40)]
    spread = statistics.stdev(products)
    assert statistics.mean(products) == pytest.approx(float(one @ other), abs=4 * spread / 40**0.5)
    assert spread < 4 * float(one.norm() * other.norm()) / estimators.SKETCH_SIZE**0.5
    short = Sketch(100, 0, CPU)
    assert float(short(one[:100]) @ short(other[:100])) == pytest.approx(float(one[:100] @ other[:100]), rel=1e-5)
