"""Erasing and mixing follow timm's laws, and depend on nothing but the place in the run."""

import math
import random
import struct
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import beta, binomtest, ks_2samp, kstest, norm
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from pipeline.accumulation import Part, parts
from pipeline.methods import mixing
from pipeline.methods.mixing import Mixing, erased, rectangles

CONFIDENCE = 1e-3
CLASSES = 7


def photos(count: int, size: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def timm_rectangles(count: int, size: int, probability: float, area: tuple[float, float], aspect: float) -> Tensor:
    """Return top, left, height and width of what timm erases of black images, [count, 4]; zeros for nothing."""
    random.seed(0)
    eraser = RandomErasing(probability, *area, min_aspect=aspect, device="cpu")
    hole = eraser(torch.ones(count, 1, size, size))[:, 0] == 0
    sides = [hole.any(2), hole.any(1)]
    corner, extent = (
        [f(side) for side in sides] for f in (lambda side: side.int().argmax(1), lambda side: side.sum(1))
    )
    return torch.stack([*corner, *extent], 1)


@pytest.mark.parametrize(
    ("size", "probability", "area", "aspect"),
    [
        (224, 0.25, (0.02, 1 / 3), 0.3),
        (32, 1.0, (0.02, 1 / 3), 0.3),
        # Of ten draws all fail at times, or always.
        (32, 1.0, (0.6, 1.2), 0.1),
        (32, 1.0, (1.1, 1.2), 0.3),
        # So small that sides are rounded to nothing.
        (8, 1.0, (0.02, 1 / 3), 0.3),
        (3, 1.0, (0.02, 1 / 3), 0.3),
        (2, 1.0, (0.02, 1 / 3), 0.3),
        (1, 1.0, (0.02, 1 / 3), 0.3),
    ],
)
def test_rectangles_follow_the_law_of_timm(
    size: int, probability: float, area: tuple[float, float], aspect: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixing, "AREA", area)
    monkeypatch.setattr(mixing, "LEAST_ASPECT", aspect)
    # timm's take a while to make and to find in large images.
    count = 1000 if size > 100 else 4000
    ours = rectangles(torch.arange(2 * count), size, 3, probability).double()
    theirs = timm_rectangles(count, size, probability, area, aspect).double()
    areas = [each[:, 2] * each[:, 3] for each in (ours, theirs)]
    assert ks_2samp(*areas).pvalue > CONFIDENCE
    ours, theirs = ours[areas[0] > 0], theirs[areas[1] > 0]
    statistics: list[Callable[[Tensor], Tensor]] = [
        lambda box: box[:, 2] / box[:, 3],
        lambda box: box[:, 0],
        lambda box: box[:, 1],
        lambda box: size - box[:, 0] - box[:, 2],
        lambda box: size - box[:, 1] - box[:, 3],
    ]
    # Of nothing there is no law.
    for statistic in statistics if len(theirs) else []:
        assert ks_2samp(statistic(ours), statistic(theirs)).pvalue > CONFIDENCE


def test_rectangles_lie_within_the_image() -> None:
    for size in (1, 2, 5, 224):
        top, left, height, width = rectangles(torch.arange(2000), size, 0, 1.0).T
        for low, extent in ((top, height), (left, width)):
            assert bool(((low >= 0) & (extent >= 0) & (low + extent <= size)).all())
            assert bool((low == low.floor()).all())
            assert bool((extent == extent.floor()).all())


def test_as_many_images_are_erased_as_asked_for() -> None:
    for probability in (0.0, 0.25, 1.0):
        drawn = rectangles(torch.arange(5000), 64, 0, probability)
        count = int((drawn[:, 2] > 0).sum())
        assert binomtest(count, 5000, probability).pvalue > CONFIDENCE


def holes(index: Tensor, size: int, seed: int, probability: float) -> Tensor:
    """Return where images are erased, [B, 1, S, S]."""
    hole = torch.zeros(len(index), 1, size, size, dtype=torch.bool)
    for k, (top, left, height, width) in enumerate(rectangles(index, size, seed, probability).int().tolist()):
        hole[k, 0, top : top + height, left : left + width] = True
    return hole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_outside_are_untouched_and_all_inside_are_new(dtype: torch.dtype) -> None:
    images, index = photos(200, 24).to(dtype), torch.arange(700, 900)
    hole = holes(index, 24, 5, 0.5).expand_as(images)
    before = images.clone()
    changed = erased(images, index, 5, 0.5)
    assert torch.equal(images, before)
    assert changed.dtype == dtype
    assert torch.equal(changed[~hole], images[~hole])
    # In bfloat16 a few new ones are as the old ones were.
    assert float((changed[hole] != images[hole]).float().mean()) > (0.9999 if dtype == torch.float32 else 0.98)
    assert 0.02 < float(hole.float().mean()) < 0.15


def test_erased_pixels_are_normal_noise() -> None:
    index = torch.arange(400)
    hole = holes(index, 32, 0, 1.0).expand(-1, 3, -1, -1)
    changed = erased(torch.full((400, 3, 32, 32), torch.nan), index, 0, 1.0)
    assert torch.equal(changed.isnan(), ~hole)
    noise = changed[hole].double()
    # Four standard errors.
    assert float(noise.mean()) == pytest.approx(0, abs=4 / math.sqrt(len(noise)))
    assert float(noise.std()) == pytest.approx(1, abs=4 / math.sqrt(2 * len(noise)))
    assert kstest(noise.numpy(), norm.cdf).pvalue > CONFIDENCE
    first, *others = (changed[:, k][hole[:, k]] for k in range(3))
    others += [first.roll(1)]
    correlation = torch.corrcoef(torch.stack([first, *others]))[0, 1:]
    assert float(correlation.abs().max()) < 5 / math.sqrt(len(first))


def test_what_is_erased_depends_on_the_sample_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    images, index = photos(150), torch.arange(3000, 3150)
    whole = erased(images, index, 7, 0.5)
    # Two ranks, another order, one alone.
    for some in (slice(0, None, 2), slice(1, None, 2), torch.randperm(150), slice(9, 10)):
        assert torch.equal(erased(images[some], index[some], 7, 0.5), whole[some])
    for chunk in (1, 7, 1000):
        monkeypatch.setattr(mixing, "_CHUNK", chunk)
        assert torch.equal(erased(images, index, 7, 0.5), whole)


def test_other_samples_and_seeds_are_erased_otherwise() -> None:
    index = torch.arange(64)
    first = rectangles(index, 64, 0, 1.0)
    for other in (rectangles(index, 64, 1, 1.0), rectangles(index + 64, 64, 0, 1.0)):
        assert float((first == other).all(1).float().mean()) < 0.05
    noise = [erased(torch.zeros(64, 3, 8, 8), index, seed, 1.0) for seed in (0, 1)]
    both = (noise[0] != 0) & (noise[1] != 0)
    assert int(both.sum()) > 100
    assert bool((noise[0] != noise[1])[both].all())


def test_a_rectangle_tells_nothing_of_its_noise() -> None:
    index = torch.arange(4000)
    box = rectangles(index, 8, 0, 1.0)
    noise = erased(torch.full((4000, 3, 8, 8), torch.nan), index, 0, 1.0).nanmean((1, 2, 3))
    some = ~noise.isnan()
    correlation = torch.corrcoef(torch.cat([noise[some][None], box[some].T.float()]))[0, 1:]
    assert float(correlation.abs().max()) < 5 / math.sqrt(int(some.sum()))


# mixup, cutmix
KINDS = [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)]


def expected(
    images: Tensor, labels: Tensor, seed: int, progress: float, mixup: float, cutmix: float, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Mix by hand, in fp64, each sample with that half a batch away; timm's draws in timm's order."""
    generator = np.random.RandomState([seed % 2**32, *struct.unpack("<II", struct.pack("<d", progress))])
    # The first decides whether to mix at all, which it always does.
    generator.rand()
    cut = generator.rand() < 0.5 if mixup and cutmix else bool(cutmix)
    share = generator.beta(*[cutmix if cut else mixup] * 2)
    size, others, partner = images.shape[-1], images.double().roll(len(images) // 2, 0), labels.roll(len(labels) // 2)
    if cut:
        side = int(size * math.sqrt(1 - share))
        y, x = generator.randint(0, size), generator.randint(0, size)
        inside = torch.zeros(size, size, dtype=torch.bool)
        inside[max(0, y - side // 2) : y + (side + 1) // 2, max(0, x - side // 2) : x + (side + 1) // 2] = True
        share = 1 - float(inside.double().mean())
        mixed = torch.where(inside, others, images.double())
    else:
        mixed = share * images.double() + (1 - share) * others
    hot = torch.eye(CLASSES, dtype=torch.float64) * (1 - smoothing) + smoothing / CLASSES
    return mixed, share * hot[labels] + (1 - share) * hot[partner]


@pytest.mark.parametrize(("mixup", "cutmix"), KINDS)
@pytest.mark.parametrize("count", [2, 12])
def test_images_and_labels_are_mixed_as_by_timm(mixup: float, cutmix: float, count: int) -> None:
    images, labels = photos(count), torch.randint(CLASSES, (count,), generator=torch.Generator().manual_seed(1))
    before = images.clone()
    for seed, progress in [(0, 0.0), (-3, 0.5), (2**40 + 1, 0.123456789), *((5, k / 37) for k in range(37))]:
        ours = Mixing(mixup, cutmix, 0.1, CLASSES)(images, labels, seed, progress)
        theirs = expected(images, labels, seed, progress, mixup, cutmix, 0.1)
        for one, other in zip(ours, theirs, strict=True):
            # A few roundings of fp32.
            torch.testing.assert_close(one.double(), other, atol=2e-6, rtol=0)
    assert torch.equal(images, before)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.0, 0.0), *KINDS])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_targets_are_distributions(mixup: float, cutmix: float, smoothing: float) -> None:
    labels = torch.arange(12) % CLASSES
    for progress in (0.1, 0.2, 0.3, 0.4):
        _, targets = Mixing(mixup, cutmix, smoothing, CLASSES)(photos(12), labels, 0, progress)
        torch.testing.assert_close(targets.sum(1), torch.ones(12))
        assert float(targets.min()) >= smoothing / CLASSES - 1e-7


def test_without_mixing_only_labels_are_smoothed() -> None:
    """Of any number of samples."""
    for count in (1, 3, 8):
        images, labels = photos(count), torch.arange(count) % CLASSES
        mixed, targets = Mixing(0.0, 0.0, 0.1, CLASSES)(images, labels, 0, 0.5)
        assert torch.equal(mixed, images)
        torch.testing.assert_close(targets, 0.9 * torch.eye(CLASSES)[labels] + 0.1 / CLASSES)


def numpy_state() -> NDArray[np.uint32]:
    _, key, position, *_ = np.random.get_state(legacy=True)
    return np.append(key, position)


def test_numpy_draws_on_as_if_nothing_had_been_mixed() -> None:
    np.random.seed(5)
    np.random.standard_normal(3)
    before = numpy_state()
    for kind in KINDS:
        Mixing(*kind, 0.1, CLASSES)(photos(4), torch.arange(4), 0, 0.5)
    # Also after an error: pairs need an even number.
    with pytest.raises(AssertionError):
        Mixing(0.8, 1.0, 0.1, CLASSES)(photos(3), torch.arange(3), 0, 0.5)
    assert (numpy_state() == before).all()


def test_what_is_drawn_before_makes_no_difference() -> None:
    def mixed() -> Tensor:
        return Mixing(0.8, 1.0, 0.1, CLASSES)(photos(4), torch.arange(4), 3, 0.25)[0]

    first = mixed()
    np.random.seed(1)
    assert torch.equal(mixed(), first)


@pytest.mark.parametrize(("mixup", "cutmix"), KINDS)
@pytest.mark.parametrize(("ranks", "part"), [(1, 2), (1, 8), (2, 0), (2, 4), (3, 2), (6, 0), (12, 0), (4, 2)])
def test_any_processes_and_parts_mix_the_same_samples(mixup: float, cutmix: float, ranks: int, part: int) -> None:
    images, labels, index = photos(24), torch.arange(24) % CLASSES, torch.arange(100, 124)
    mix = Mixing(mixup, cutmix, 0.1, CLASSES)
    for progress in (0.1, 0.2, 0.3):
        whole = mix(images, labels, 3, progress)
        seen: list[int] = []
        for rank in range(ranks):
            # As the loader shares a batch.
            share = slice(rank, None, ranks)
            for some in parts(Part((images[share],), labels[share], index[share]), part):
                assert some.labels is not None
                mixed, targets = mix(some.views[0], some.labels, 3, progress)
                assert torch.equal(mixed, whole[0][some.index - 100])
                assert torch.equal(targets, whole[1][some.index - 100])
                seen += some.index.tolist()
        assert sorted(seen) == index.tolist()


def test_shares_of_mixup_are_drawn_anew_for_every_step() -> None:
    mix, images, labels = Mixing(0.8, 0.0, 0.0, 2), torch.zeros(2, 3, 4, 4), torch.arange(2)
    drawn = [float(mix(images, labels, 1, step / 1000)[1][0, 0]) for step in range(1000)]
    assert kstest(drawn, beta(0.8, 0.8).cdf).pvalue > CONFIDENCE
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 4 / math.sqrt(1000)


def test_half_of_the_batches_are_cut() -> None:
    mix, images = Mixing(0.8, 1.0, 0.0, 2), torch.arange(2.0)[:, None, None, None].expand(2, 3, 4, 4)
    mixed = [mix(images, torch.arange(2), 2, step / 1000)[0] for step in range(1000)]
    # A pixel is of one image then.
    cut = sum(bool(((each == 0) | (each == 1)).all()) for each in mixed)
    assert binomtest(cut, 1000, 0.5).pvalue > CONFIDENCE


@pytest.mark.parametrize(("mixup", "cutmix", "mixes"), [(0, 0, False), (0.8, 0, True), (0, 1, True), (0.8, 1, True)])
def test_it_says_whether_it_mixes(mixup: float, cutmix: float, mixes: bool) -> None:
    assert Mixing(mixup, cutmix, 0.1, CLASSES).mixes is mixes
