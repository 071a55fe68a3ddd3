"""Random choices: uniform, independent, pure."""

import math

import pytest
import torch
from scipy.stats import binom, chi2, kstest, norm

from pipeline.models import stateless_random
from pipeline.models.stateless_random import normals, random_subset, residual_scales, uniforms

CONFIDENCE = 1e-3


def test_subset_is_without_replacement_in_order_and_pure() -> None:
    index = torch.arange(1000, 1064)
    chosen = random_subset(index, 36, 9, seed=3, stream=0)
    assert chosen.shape == (64, 9)
    assert bool((chosen[:, 1:] > chosen[:, :-1]).all())
    assert int(chosen.min()) >= 0
    assert int(chosen.max()) < 36
    assert torch.equal(random_subset(index.flip(0), 36, 9, 3, 0).flip(0), chosen)
    for other in (random_subset(index, 36, 9, 4, 0), random_subset(index, 36, 9, 3, 1)):
        assert (other != chosen).float().mean() > 0.5


def test_every_token_is_kept_equally_often() -> None:
    samples, tokens, keep = 20_000, 25, 6
    chosen = random_subset(torch.arange(samples), tokens, keep, seed=0, stream=1)
    counts = torch.bincount(chosen.flatten(), minlength=tokens).double()
    expected = samples * keep / tokens
    # Counts of a fixed-size subset vary less than multinomial ones: the statistic is bounded by chi2.
    statistic = float(((counts - expected) ** 2 / expected).sum()) / (1 - keep / tokens) * (tokens - 1) / tokens
    assert chi2.ppf(0.0005, tokens - 1) < statistic < chi2.ppf(0.9995, tokens - 1)
    first, second = (torch.zeros(samples, dtype=torch.bool) for _ in range(2))
    first[(chosen == 3).any(1)] = True
    second[(chosen == 4).any(1)] = True
    both = float((first & second).float().mean())
    assert both == pytest.approx(keep * (keep - 1) / tokens / (tokens - 1), abs=0.006)


def test_every_subset_is_equally_likely() -> None:
    samples, tokens, keep = 30_000, 7, 3
    chosen = random_subset(torch.arange(samples), tokens, keep, seed=5, stream=0)
    _, counts = (2**chosen).sum(1).unique(return_counts=True)
    subsets = math.comb(tokens, keep)
    assert len(counts) == subsets
    expected = samples / subsets
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert chi2.ppf(CONFIDENCE / 2, subsets - 1) < statistic < chi2.ppf(1 - CONFIDENCE / 2, subsets - 1)


def test_subsets_differ_between_samples_and_steps() -> None:
    first, second = (random_subset(torch.arange(s, s + 256), 196, 49, seed=0, stream=0) for s in (0, 256))
    assert len(torch.cat([first, second]).unique(dim=0)) == 512


def test_a_stream_for_each_sample_gives_the_bits_of_separate_calls() -> None:
    index, streams = torch.arange(40, 48), (0, 1, 5)
    together = torch.tensor(streams).repeat_interleave(8)
    subsets = [random_subset(index, 36, 9, 3, stream) for stream in streams]
    assert torch.equal(random_subset(index.repeat(3), 36, 9, 3, together), torch.cat(subsets))
    scales = [residual_scales(index, 0.5, 4, 3, stream) for stream in streams]
    assert torch.equal(residual_scales(index.repeat(3), 0.5, 4, 3, together), torch.cat(scales, 2))


def test_branches_are_dropped_at_rates_that_rise_from_zero() -> None:
    samples, rate, depth = 20_000, 0.4, 5
    scales = residual_scales(torch.arange(samples), rate, depth, seed=0, stream=0)
    for block in range(depth):
        keep = 1 - rate * block / (depth - 1)
        low, high = binom.ppf([CONFIDENCE / 20, 1 - CONFIDENCE / 20], samples, keep)
        for branch in scales[block]:
            kept = branch[branch > 0]
            assert low <= len(kept) <= high
            torch.testing.assert_close(kept, torch.full_like(kept, 1 / keep))


def test_the_expectation_of_a_factor_is_one() -> None:
    samples, rate = 50_000, 0.4
    scales = residual_scales(torch.arange(samples), rate, 2, seed=0, stream=0)
    assert torch.equal(scales[0], torch.ones(2, samples))
    # Four standard errors of a mean of factors that are 0 or 1 / (1 - rate).
    assert scales[1].mean(1).tolist() == pytest.approx([1.0, 1.0], abs=4 * math.sqrt(rate / (1 - rate) / samples))


def test_branches_of_a_sample_are_dropped_independently() -> None:
    samples = 40_000
    kept = (residual_scales(torch.arange(samples), 0.5, 2, seed=0, stream=0)[1] > 0).long()
    table = torch.bincount(2 * kept[0] + kept[1], minlength=4)
    statistic = float(((table - samples / 4) ** 2 / (samples / 4)).sum())
    assert statistic < chi2.ppf(1 - CONFIDENCE, 3)


def test_branches_and_tokens_are_dropped_independently() -> None:
    samples, depth = 10_000, 3
    index = torch.arange(samples)
    kept = (residual_scales(index, 0.5, depth, 0, 0)[-1] > 0).float()
    chosen = torch.zeros(samples, 8).scatter(1, random_subset(index, 8, 4, 0, 0), 1.0)
    correlation = torch.corrcoef(torch.cat([kept, chosen.T]))[:2, 2:]
    # Five standard errors of the correlation of independent samples.
    assert float(correlation.abs().max()) < 5 / math.sqrt(samples)


def test_neighboring_samples_seeds_and_streams_are_dropped_independently() -> None:
    samples = 40_000
    index = torch.arange(samples)
    first = residual_scales(index, 0.5, 2, seed=0, stream=0)[1, 0] > 0
    others = [residual_scales(index, 0.5, 2, seed, stream)[1, 0] > 0 for seed, stream in ((1, 0), (0, 1))]
    others.append(residual_scales(index + 1, 0.5, 2, 0, 0)[1, 0] > 0)
    for other in others:
        low, high = binom.ppf([CONFIDENCE / 6, 1 - CONFIDENCE / 6], samples, 0.5)
        assert low <= int((first == other).sum()) <= high


def test_what_is_dropped_depends_on_the_sample_alone() -> None:
    index = torch.arange(1000, 1064)
    whole = residual_scales(index, 0.5, 4, seed=2, stream=1)
    # Two ranks, and the order of another batch.
    for part in (index[0::2], index[1::2], index.flip(0)):
        assert torch.equal(residual_scales(part, 0.5, 4, 2, 1), whole[:, :, part - 1000])


@pytest.mark.parametrize("depth", [1, 3])
def test_a_rate_of_zero_drops_nothing(depth: int) -> None:
    assert torch.equal(residual_scales(torch.arange(99), 0.0, depth, 0, 0), torch.ones(depth, 2, 99))


def test_normals_are_normal() -> None:
    drawn = normals(torch.arange(1000), 201, seed=0, stream=3)
    assert drawn.shape == (1000, 201)
    assert drawn.dtype == torch.float32
    # Of both kinds, by cosine and by sine.
    for some in (drawn[:, :101], drawn[:, 101:], drawn[:, :1], drawn[:1]):
        assert kstest(some.flatten().double().numpy(), norm.cdf).pvalue > CONFIDENCE
    # Tails of a share of 1e-3 and 1e-4.
    for share in (1e-3, 1e-4):
        low, high = binom.ppf([CONFIDENCE / 2, 1 - CONFIDENCE / 2], drawn.numel(), share)
        assert low <= int((drawn.abs() > norm.isf(share / 2)).sum()) <= high


def test_normals_are_independent() -> None:
    """Of the other one of their word, their neighbors, and those of other samples, seeds and streams."""
    index, count = torch.arange(500), 200
    drawn = normals(index, count, seed=0, stream=0)
    first, second = drawn.chunk(2, 1)
    pairs = [(first, second), (drawn[:, 1:], drawn[:, :-1]), (drawn[1:], drawn[:-1])]
    pairs += [(drawn, normals(index, count, seed, stream)) for seed, stream in ((1, 0), (0, 1))]
    for one, other in pairs:
        for change in (torch.clone, torch.square):
            both = torch.stack([change(one).flatten(), change(other).flatten()])
            # Five standard errors of the correlation of independent numbers.
            assert abs(float(torch.corrcoef(both)[0, 1])) < 5 / math.sqrt(both.shape[1])


def test_normals_depend_on_sample_seed_and_stream_alone() -> None:
    index = torch.arange(1000, 1064)
    whole = normals(index, 30, seed=2, stream=1)
    for part in (index[0::2], index[1::2], index.flip(0)):
        assert torch.equal(normals(part, 30, 2, 1), whole[part - 1000])
    for other in (normals(index + 64, 30, 2, 1), normals(index, 30, 3, 1), normals(index, 30, 2, 2)):
        assert float((other == whole).float().mean()) < 0.01
    streams = torch.tensor([1, 4]).repeat_interleave(64)
    assert torch.equal(normals(index.repeat(2), 30, 2, streams), torch.cat([whole, normals(index, 30, 2, 4)]))


@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_of_an_odd_count_the_last_one_is_left_out(count: int) -> None:
    drawn = normals(torch.arange(5), count, seed=0, stream=0)
    assert drawn.shape == (5, count)
    assert torch.equal(drawn, normals(torch.arange(5), count + count % 2, seed=0, stream=0)[:, :count])


def test_no_word_makes_an_infinite_normal_or_a_uniform_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # Ends of both halves of a word, and of its sign.
    ends = [0, 1, 2**31 - 1, 2**31, 2**32 - 256, 2**32 - 1]
    words = torch.tensor([[(high << 32) + low for high in ends for low in ends]], dtype=torch.uint64).view(torch.int64)
    monkeypatch.setattr(stateless_random, "_words", lambda *_: words)
    drawn = normals(torch.arange(1), 2 * words.numel(), 0, 0)
    assert bool(drawn.isfinite().all())
    # A radius of 25 bits.
    assert float(drawn.abs().max()) == pytest.approx(math.sqrt(50 * math.log(2)))
    radius = drawn.double().square().view(2, -1).sum(0).sqrt().view(len(ends), -1)
    expected = [math.sqrt(-2 * math.log(max(1 - high / 2**32, 2**-25))) for high in ends]
    torch.testing.assert_close(radius[:, 0], torch.tensor(expected).double(), atol=1e-4, rtol=0)
    numbers = uniforms(torch.arange(1), torch.arange(1), 0, 0)
    assert numbers.dtype == torch.float64
    assert float(numbers.min()) == 0
    assert float(numbers.max()) == 1 - 2**-53


def test_uniforms_are_uniform() -> None:
    drawn = uniforms(torch.arange(500), torch.arange(-20, 20), seed=0, stream=0)
    assert drawn.shape == (500, 40)
    assert kstest(drawn.flatten().numpy(), "uniform").pvalue > CONFIDENCE
