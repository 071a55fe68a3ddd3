"""RandAugment draws by timm's law and changes pixels as PIL does. Differences in gray levels, at 96 pixels.

The bounds are those that `data.dali.randaugment` states, with a little room.
"""

import io
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy.stats import binomtest, chi2_contingency, chisquare, ks_2samp, kstest, norm
from timm.data import auto_augment
from timm.data.constants import IMAGENET_DEFAULT_MEAN

from data.dali import MEAN, STD, Encoded, ViewPipeline
from data.dali.pixels import InterleavedPixels
from data.order import hashed
from data.randaugment import FACTORS, LAYERS, MOVES, Layer, Operator, draw_layers
from data.recipes import finetune_views
from data.views import JITTERS, Column, ViewSpec, draw

SIZE = 96
CONFIDENCE = 1e-3
# As timm's factory of transforms makes it.
FILL = tuple(round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN)
PLAIN = ViewSpec(SIZE, flip=0.0, jitter_probability=0.0, grayscale=0.0, randaugment=9.0)
NAMES = {
    Operator.AUTO_CONTRAST: "AutoContrast",
    Operator.EQUALIZE: "Equalize",
    Operator.INVERT: "Invert",
    Operator.POSTERIZE: "PosterizeIncreasing",
    Operator.SOLARIZE: "SolarizeIncreasing",
    Operator.SOLARIZE_ADD: "SolarizeAdd",
    Operator.COLOR: "ColorIncreasing",
    Operator.CONTRAST: "ContrastIncreasing",
    Operator.BRIGHTNESS: "BrightnessIncreasing",
    Operator.SHARPNESS: "SharpnessIncreasing",
    Operator.ROTATE: "Rotate",
    Operator.SHEAR_X: "ShearX",
    Operator.SHEAR_Y: "ShearY",
    Operator.TRANSLATE_X: "TranslateXRel",
    Operator.TRANSLATE_Y: "TranslateYRel",
}

Pictures = list[Image.Image]
Levels = NDArray[np.float64]
# Operator and amount.
Case = tuple[Operator, float]
NOTHING: Case = (Operator.NONE, 0.0)


def layers(magnitude: float, samples: int) -> NDArray[np.float64]:
    """Draw [samples, LAYERS, len(Layer)]."""
    return draw_layers(hashed(1, np.arange(samples)), magnitude).reshape(-1, LAYERS, len(Layer))


def timm_transform(magnitude: float) -> Any:
    """Return timm's transform of logs instead of images: every operator adds its name and amounts."""
    transform = auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", {"img_mean": FILL})
    for operator in transform.ops:
        operator.magnitude, operator.aug_fn = magnitude, partial(noted, operator.name)
    random.seed(0)
    np.random.seed(0)
    return transform


def noted(name: str, log: list[Any], *amounts: float, **_: Any) -> list[Any]:
    return [*log, (name, *amounts)]


def test_operators_are_drawn_as_often_as_by_timm() -> None:
    transform = timm_transform(9.0)
    assert sorted(operator.name for operator in transform.ops) == sorted(NAMES.values())
    logs = [transform([]) for _ in range(15_000)]
    names = [name for log in logs for name, *_ in log]
    theirs = [LAYERS * len(logs) - len(names), *(names.count(name) for name in NAMES.values())]
    for layer in range(LAYERS):
        ours = np.bincount(layers(9.0, 30_000)[:, layer, Layer.OPERATOR].astype(int), minlength=len(Operator))
        assert chisquare(ours, 30_000 * np.array([1 / 2] + [1 / 30] * 15)).pvalue > CONFIDENCE
        assert chi2_contingency([ours, theirs]).pvalue > CONFIDENCE


def test_half_of_the_layers_do_nothing() -> None:
    transform = timm_transform(9.0)
    theirs = np.bincount([len(transform([])) for _ in range(5000)], minlength=3)
    drawn = layers(9.0, 30_000)
    some = np.count_nonzero(drawn[..., Layer.OPERATOR], axis=1)
    assert chisquare(np.bincount(some), 30_000 * np.array([1, 2, 1]) / 4).pvalue > CONFIDENCE
    assert chi2_contingency([np.bincount(some), theirs]).pvalue > CONFIDENCE
    assert (drawn[drawn[..., Layer.OPERATOR] == Operator.NONE] == 0).all()


@pytest.mark.parametrize("magnitude", [9.0, 4.5, 0.5])
def test_amounts_follow_the_law_of_timm(magnitude: float) -> None:
    """At 9 and 0.5 the magnitude is clipped at times, at 10 and at 0."""
    drawn = layers(magnitude, 60_000).reshape(-1, len(Layer))
    transform = {operator.name: operator for operator in timm_transform(magnitude).ops}
    for operator, name in NAMES.items():
        ours = drawn[drawn[:, Layer.OPERATOR] == operator, Layer.AMOUNT]
        transform[name].prob = 1.0
        logs = [transform[name]([])[0] for _ in range(4000)]
        if len(logs[0]) == 1:
            assert (ours == 0).all()
            continue
        theirs = np.array([amount for _, amount in logs])
        # Two samples of 4000 from one law differ by more than 0.043 once in a thousand; there are 36 pairs here.
        assert ks_2samp(np.round(ours, 9), np.round(theirs, 9)).statistic < 0.052, operator


@pytest.mark.parametrize("magnitude", np.linspace(0, 10, 21))
def test_a_magnitude_means_the_amounts_that_it_means_to_timm(magnitude: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.randaugment._SPREAD", 0.0)
    drawn = layers(magnitude, 1000).reshape(-1, len(Layer))
    for operator, name in NAMES.items():
        level_fn, theirs = auto_augment.LEVEL_TO_ARG[name], set()
        for sign in (-1.0, 1.0):
            monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value, sign=sign: sign * value)
            theirs.add(level_fn(magnitude, {})[0] if level_fn else 0.0)
        ours = np.unique(drawn[drawn[:, Layer.OPERATOR] == operator, Layer.AMOUNT])
        assert ours.tolist() == pytest.approx(sorted(theirs), rel=1e-12, abs=0)


def magnitudes(drawn: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the magnitudes of layers that move pixels, with the signs of the moves."""
    moves = drawn[drawn[..., Layer.OPERATOR] >= Operator.ROTATE]
    most = np.array([30, 0.3, 0.3, 0.45, 0.45])[moves[:, Layer.OPERATOR].astype(int) - Operator.ROTATE]
    return moves[:, Layer.AMOUNT] / most * 10


def test_magnitudes_are_normal_and_clipped() -> None:
    """With a deviation of 0.5 around the one asked for; what is beyond 10 is 10."""
    for magnitude in (4.5, 9.0):
        drawn = np.abs(magnitudes(layers(magnitude, 60_000)))
        assert len(drawn) > 19_000
        inner = drawn[drawn < 9.999]
        upto = norm.cdf(10, magnitude, 0.5)
        assert kstest(inner, lambda x, m=magnitude, upto=upto: norm.cdf(x, m, 0.5) / upto).pvalue > CONFIDENCE
        assert binomtest(len(inner), len(drawn), upto).pvalue > CONFIDENCE


def test_layers_are_drawn_independently() -> None:
    drawn = layers(9.0, 100_000)
    first, second = drawn[..., Layer.OPERATOR].astype(int).T
    table = np.bincount(len(Operator) * first + second, minlength=len(Operator) ** 2).reshape(len(Operator), -1)
    assert chi2_contingency(table).pvalue > CONFIDENCE
    moves = (first >= Operator.ROTATE) & (second >= Operator.ROTATE)
    one, other = magnitudes(drawn[moves]).reshape(-1, LAYERS).T
    for each in (lambda amount: amount, np.abs, np.sign):
        # Five standard errors of the correlation of independent samples.
        assert abs(np.corrcoef(each(one), each(other))[0, 1]) < 5 / np.sqrt(len(one))


def rows(spec: ViewSpec, samples: int = 3000, **place: Any) -> NDArray[np.float32]:
    zeros, sample = np.zeros(samples, np.int64), np.arange(samples)
    place = {"seed": 1, "view": 0, "epoch": zeros, "sample": sample} | place
    return draw(spec, heights=zeros + 375, widths=zeros + 500, **place)


def test_every_part_of_the_place_matters_and_nothing_else() -> None:
    base = rows(PLAIN, 50)[:, len(Column) :]
    assert base.shape == (50, LAYERS * len(Layer))
    for other in ({"seed": 2}, {"view": 1}, {"epoch": np.ones(50, np.int64)}, {"sample": np.arange(1, 51)}):
        # Half of the layers are alike by chance.
        assert np.mean(rows(PLAIN, 50, **other)[:, len(Column) :] == base) < 0.5
    some = np.array([31, 7, 7, 12])
    assert (rows(PLAIN, 4, sample=some)[:, len(Column) :] == base[some]).all()
    assert (rows(replace(PLAIN, size=32, crop="center", blur=0.5), 50)[:, len(Column) :] == base).all()


@pytest.mark.parametrize("spec", [ViewSpec(32, blur=0.5, solarize=0.5), ViewSpec(32, crop="center")])
def test_randaugment_leaves_all_other_numbers_as_they_are(spec: ViewSpec) -> None:
    assert (rows(replace(spec, randaugment=9.0))[:, : len(Column)] == rows(spec)).all()


def test_layers_depend_on_nothing_else_that_is_drawn() -> None:
    drawn = rows(ViewSpec(32, jitter_probability=1.0, blur=0.5, solarize=0.5, grayscale=0.5, randaugment=9.0), 20_000)
    others = [column for column in Column if column != Column.JITTER]
    correlation = np.corrcoef(drawn[:, [*others, *range(len(Column), drawn.shape[1])]].T)
    assert np.abs(correlation[: len(others), len(others) :]).max() < 5 / np.sqrt(20_000)


def test_only_fine_tuning_has_it() -> None:
    (view,) = finetune_views(224)
    assert view == ViewSpec(
        224, jitter_probability=0.0, grayscale=0.0, interpolation="bicubic", randaugment=9.0, flip=0.5
    )
    assert finetune_views(224, 0.3, 0.0)[0].randaugment == 0


@pytest.fixture(scope="module", params=["planar", "interleaved"])
def arrangement(request: pytest.FixtureRequest) -> Iterator[None]:
    """Arrange views as the CPU does, or as the GPU does, though the CPU makes both."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "interleaved":
            patch.setattr("data.dali.view.PlanarPixels", lambda size: InterleavedPixels())
        yield


@pytest.fixture(scope="module")
def squares(pictures: list[NDArray[np.uint8]]) -> Pictures:
    """Return images at exactly the size of a view."""
    opened = [Image.open(io.BytesIO(each.tobytes())).convert("RGB") for each in (pictures[0], *pictures[-4:])]
    return [ImageOps.fit(each, (SIZE, SIZE)) for each in opened]


def render(pictures: Pictures, drawn: Any, spec: ViewSpec = PLAIN, **columns: float) -> Levels:
    """Return in gray levels [n, S, S, 3] what becomes of whole images, lossless; ``drawn``: the layers of each."""
    numbers = np.zeros((len(pictures), len(Column)), np.float32)
    numbers[:, [Column.HEIGHT, Column.WIDTH]] = SIZE
    numbers[:, [Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION]] = 1
    numbers[:, Column.FIRST :] = JITTERS
    for name, value in columns.items():
        numbers[:, Column[name.upper()]] = value
    numbers = np.hstack([numbers, np.reshape(drawn, (len(pictures), -1))]).astype(np.float32)
    files = {key: png(each) for key, each in {id(each): each for each in pictures}.items()}
    batch = Encoded([files[id(each)] for each in pictures], (numbers,), np.arange(len(pictures))[:, None])
    source, cpu = iter([batch]).__next__, torch.device("cpu")
    pipeline = ViewPipeline([spec], source, batch_size=len(pictures), device=cpu, threads=1)
    (view,), _ = next(pipeline)
    pipeline.close()
    return view.permute(0, 2, 3, 1).numpy().astype(float) * STD + MEAN


def png(picture: Image.Image) -> NDArray[np.uint8]:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def by_timm(picture: Image.Image, case: Case, resample: Image.Resampling = Image.Resampling.BILINEAR) -> Image.Image:
    """Change an image by the function that timm calls, with the amount that the pipeline gets, which is float32."""
    operator, amount = case
    if operator == Operator.POSTERIZE and amount == 0:
        # timm asks Pillow for 0 bits, of which 12 and older keep none; newer ones refuse them.
        return Image.new("RGB", picture.size)
    name, whole = NAMES[operator], operator in (Operator.POSTERIZE, Operator.SOLARIZE, Operator.SOLARIZE_ADD)
    amounts = () if auto_augment.LEVEL_TO_ARG[name] is None else (int(amount) if whole else float(np.float32(amount)),)
    changed: Image.Image = auto_augment.NAME_TO_OP[name](picture, *amounts, fillcolor=FILL, resample=resample)
    return changed


def equalized(picture: Image.Image) -> Image.Image:
    """Equalize as OpenCV does: a level becomes the share of those up to it, the lowest one taken off."""
    levels = np.array(picture)
    for channel in range(3):
        counts = np.bincount(levels[..., channel].ravel(), minlength=256)
        above = SIZE**2 - counts[levels[..., channel].min()]
        if above:
            share = (np.cumsum(counts) - (SIZE**2 - above)) / above
            levels[..., channel] = np.rint(255 * share.clip(0))[levels[..., channel]]
    return Image.fromarray(levels)


def reference(picture: Image.Image, case: Case) -> Image.Image:
    if case[0] == Operator.NONE:
        return picture
    return equalized(picture) if case[0] == Operator.EQUALIZE else by_timm(picture, case)


def drawn_pairs() -> list[tuple[Case, Case]]:
    """Return some pairs that are drawn, of those in which both layers do something."""
    both = layers(9.0, 120)
    both = both[(both[..., Layer.OPERATOR] > 0).all(axis=1)].astype(np.float32)
    first, second = (
        [(Operator(int(operator)), float(amount)) for operator, amount in each] for each in both.swapaxes(0, 1)
    )
    return list(zip(first, second, strict=True))


def stacked(pictures: Pictures) -> Levels:
    return np.stack([np.array(each, float) for each in pictures])


FACTOR_AMOUNTS = (0.1, 0.37, 1.0, 1.9)
AMOUNTS: dict[Operator, tuple[float, ...]] = {
    Operator.AUTO_CONTRAST: (0,),
    Operator.EQUALIZE: (0,),
    Operator.INVERT: (0,),
    Operator.POSTERIZE: (0, 1, 2, 4),
    Operator.SOLARIZE: (0, 26, 128, 255, 256),
    Operator.SOLARIZE_ADD: (0, 1, 99, 110),
    **dict.fromkeys(FACTORS, FACTOR_AMOUNTS),
    Operator.ROTATE: (-30.0, 13.3),
    Operator.SHEAR_X: (-0.3, 0.123),
    Operator.SHEAR_Y: (-0.3, 0.123),
    Operator.TRANSLATE_X: (-0.45, 0.2513),
    Operator.TRANSLATE_Y: (-0.45, 0.2513),
}
CASES = [(operator, amount) for operator, amounts in AMOUNTS.items() for amount in amounts]
TONES = [(Operator.INVERT, 0), (Operator.POSTERIZE, 2), (Operator.SOLARIZE, 100), (Operator.SOLARIZE_ADD, 90)]
PAIRS: list[tuple[Case, Case]] = [(first, second) for first in TONES for second in TONES]
DRAWN = drawn_pairs()
ALL = [(NOTHING, NOTHING), *((case, NOTHING) for case in CASES), *PAIRS, *DRAWN]
# Largest mean differences. A single one is a level at most.
EXACT = 1e-3
BOUNDS = {
    Operator.AUTO_CONTRAST: 0.05,
    Operator.EQUALIZE: EXACT,
    Operator.INVERT: EXACT,
    Operator.POSTERIZE: EXACT,
    Operator.SOLARIZE: EXACT,
    Operator.SOLARIZE_ADD: EXACT,
    Operator.COLOR: 0.3,
    Operator.CONTRAST: 0.05,
    Operator.BRIGHTNESS: 0.05,
    Operator.SHARPNESS: 0.3,
}


@pytest.fixture(scope="module")
def changed(arrangement: None, squares: Pictures) -> dict[tuple[Case, Case], Levels]:
    """Return what the pipeline makes of the squares by two layers, for each pair of `ALL`."""
    views = render(squares * len(ALL), [pair for pair in ALL for _ in squares])
    return dict(zip(ALL, views.reshape(len(ALL), -1, SIZE, SIZE, 3), strict=True))


Changed = dict[tuple[Case, Case], Levels]
each_color = pytest.mark.parametrize("operator", BOUNDS, ids=lambda operator: operator.name.lower())
each_move = pytest.mark.parametrize("operator", MOVES, ids=lambda operator: operator.name.lower())


@each_color
def test_each_change_of_color_is_that_of_pil(changed: Changed, squares: Pictures, operator: Operator) -> None:
    """PIL equalizes by another formula, which has a test of its own, and sharpens nothing at the very edge."""
    inner = slice(1, -1) if operator == Operator.SHARPNESS else slice(None)
    for amount in AMOUNTS[operator]:
        theirs = stacked([reference(each, (operator, amount)) for each in squares])
        apart = np.abs(changed[(operator, amount), NOTHING] - theirs)[:, inner, inner]
        assert apart.mean() < BOUNDS[operator], amount
        assert apart.max() < 1.01, amount


def test_equalized_histograms_are_near_those_of_pil(changed: Changed, squares: Pictures) -> None:
    """A level becomes the share of those up to it; in PIL it becomes the share of those below it."""
    case = (Operator.EQUALIZE, 0)
    apart = np.abs(changed[case, NOTHING] - stacked([by_timm(each, case) for each in squares]))
    assert 0.3 < apart.mean() < 5


def depths(operator: Operator, amount: float) -> Levels:
    """Return how far inside the image each pixel comes from, in pixels [S, S]; negative is from outside."""
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    if operator == Operator.ROTATE:
        # Complex numbers turn about the middle; y points downwards.
        middle = SIZE / 2 * (1 + 1j)
        source = (x + 1j * y - middle) * np.exp(1j * np.radians(amount)) + middle
        x, y = source.real, source.imag
    else:
        right = {Operator.SHEAR_X: amount * y, Operator.TRANSLATE_X: amount * SIZE}
        down = {Operator.SHEAR_Y: amount * x, Operator.TRANSLATE_Y: amount * SIZE}
        x, y = x + right.get(operator, 0), y + down.get(operator, 0)
    return np.minimum.reduce([x, y, SIZE - x, SIZE - y])


@each_move
def test_each_move_of_pixels_is_that_of_pil(changed: Changed, squares: Pictures, operator: Operator) -> None:
    """Half a pixel around the edges, what is there is mixed with what comes in; in PIL it is not."""
    for amount in AMOUNTS[operator]:
        theirs = stacked([by_timm(each, (operator, amount)) for each in squares])
        apart = np.abs(changed[(operator, amount), NOTHING] - theirs)
        inside = depths(operator, amount) > 0.51
        assert inside.mean() > 0.4
        assert apart[:, inside].mean() < 0.1, amount
        assert apart[:, inside].max() < 1.01, amount
        assert apart.mean() < 0.5, amount


@each_move
def test_the_mean_color_comes_in_from_beyond_the_edges(changed: Changed, operator: Operator) -> None:
    for amount in AMOUNTS[operator]:
        outside = depths(operator, amount) < -0.51
        assert outside.mean() > 0.04
        assert np.abs(changed[(operator, amount), NOTHING][:, outside] - FILL).max() < EXACT, amount


@each_move
def test_moves_differ_more_from_a_bicubic_pil(changed: Changed, squares: Pictures, operator: Operator) -> None:
    for amount in AMOUNTS[operator]:
        bicubic = [by_timm(each, (operator, amount), Image.Resampling.BICUBIC) for each in squares]
        assert 0.5 < np.abs(changed[(operator, amount), NOTHING] - stacked(bicubic)).mean() < 5, amount


def test_layers_work_one_after_the_other(changed: Changed, squares: Pictures) -> None:
    for first, second in PAIRS:
        theirs = stacked([reference(reference(each, first), second) for each in squares])
        assert np.abs(changed[first, second] - theirs).max() < EXACT, (first, second)


def test_layers_that_do_nothing_change_nothing(changed: Changed, squares: Pictures) -> None:
    assert np.abs(changed[NOTHING, NOTHING] - stacked(squares)).max() < EXACT


def test_drawn_views_are_those_of_timms_sequence(changed: Changed, squares: Pictures) -> None:
    """But for the histograms, which are equalized as OpenCV does in both."""
    assert {operator for pair in DRAWN for operator, _ in pair} == set(NAMES)
    per_image = []
    for first, second in DRAWN:
        theirs = stacked([reference(reference(each, first), second) for each in squares])
        per_image += np.abs(changed[first, second] - theirs).mean(axis=(1, 2, 3)).tolist()
    assert np.median(per_image) < 0.25
    assert np.mean(per_image) < 0.3
    assert np.max(per_image) < 1.5


def test_jitter_and_flip_come_after_it(arrangement: None) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8))
    spec, move = replace(PLAIN, jitter_probability=0.8), (Operator.TRANSLATE_X, 0.25)
    ours = render([picture], [(Operator.INVERT, 0), move], spec, flip=1, jitter=1, brightness=0.6)
    theirs = by_timm(by_timm(picture, (Operator.INVERT, 0)), move)
    theirs = ImageOps.mirror(by_timm(theirs, (Operator.BRIGHTNESS, 0.6)))
    # A whole number of pixels: nothing is mixed at the edges.
    assert np.abs(ours - stacked([theirs])).max() < 1.01


def two_colors() -> Image.Image:
    """Return an image of two halves with the same red."""
    picture = Image.new("RGB", (SIZE, SIZE), (77, 30, 200))
    picture.paste((77, 90, 100), (0, 0, SIZE // 2, SIZE))
    return picture


@pytest.fixture(scope="module")
def degenerate(arrangement: None) -> dict[Case, tuple[Pictures, Levels]]:
    """Return black, white, one color and two, and what becomes of them, for each change of color."""
    pictures = [Image.new("RGB", (SIZE, SIZE), color) for color in ("black", "white", (10, 128, 201))] + [two_colors()]
    cases = [case for case in CASES if case[0] not in MOVES]
    views = render(pictures * len(cases), [(case, NOTHING) for case in cases for _ in pictures])
    views = views.reshape(len(cases), -1, SIZE, SIZE, 3)
    return {case: (pictures, changed) for case, changed in zip(cases, views, strict=True)}


def test_degenerate_images_are_changed_as_by_pil(degenerate: dict[Case, tuple[Pictures, Levels]]) -> None:
    for case, (pictures, views) in degenerate.items():
        apart = np.abs(views - stacked([reference(each, case) for each in pictures]))
        inner = slice(1, -1) if case[0] == Operator.SHARPNESS else slice(None)
        # All pixels of a color fall on the same side of a rounding: no mean.
        assert apart[:, inner, inner].max() < (EXACT if BOUNDS[case[0]] == EXACT else 1.01), case


@pytest.mark.parametrize("operator", [Operator.AUTO_CONTRAST, Operator.EQUALIZE], ids=["auto_contrast", "equalize"])
def test_a_channel_of_one_level_stays_as_it_is(
    degenerate: dict[Case, tuple[Pictures, Levels]], operator: Operator
) -> None:
    _, (*_, view) = degenerate[operator, 0]
    view = np.rint(view)
    assert (view[..., 0] == 77).all()
    assert (view[:, : SIZE // 2, 1:] == (255, 0)).all()
    assert (view[:, SIZE // 2 :, 1:] == (0, 255)).all()
