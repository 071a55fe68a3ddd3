"""The published numbers, written down once more from the papers' code."""

from data.recipes import dino_views, localmim_views, moco_views, simclr_views
from data.views import ViewSpec

# What every view of contrastive methods shares, and the class has as defaults.
COMMON = {"ratio": (3 / 4, 4 / 3), "flip": 0.5, "jitter_probability": 0.8, "grayscale": 0.2, "blur_sigma": (0.1, 2.0)}


def has(view: ViewSpec, **fields: object) -> bool:
    return all(getattr(view, name) == value for name, value in fields.items())


def test_moco() -> None:
    first, second = moco_views(224)
    jitter = (0.4, 0.4, 0.2, 0.1)
    shared = {"size": 224, "scale": (0.08, 1.0), "jitter": jitter, "interpolation": "bilinear"} | COMMON
    assert has(first, blur=1.0, solarize=0.0, **shared)
    assert has(second, blur=0.1, solarize=0.2, **shared)
    assert moco_views(160, crop_min=0.2)[1].scale == (0.2, 1.0)


def test_simclr() -> None:
    jitter = (0.4, 0.4, 0.4, 0.1)
    for view in simclr_views(224):
        assert has(view, size=224, scale=(0.08, 1.0), jitter=jitter, blur=0.5, solarize=0.0, **COMMON)


def test_dino() -> None:
    first, second, *small = dino_views(224)
    shared = {"jitter": (0.4, 0.4, 0.2, 0.1), "interpolation": "bicubic"} | COMMON
    assert has(first, size=224, scale=(0.4, 1.0), blur=1.0, solarize=0.0, **shared)
    assert has(second, size=224, scale=(0.4, 1.0), blur=0.1, solarize=0.2, **shared)
    assert len(small) == 8
    assert all(has(view, size=96, scale=(0.05, 0.4), blur=0.5, solarize=0.0, **shared) for view in small)
    assert len(dino_views(224, small_crops=10)) == 12


def test_localmim() -> None:
    (view,) = localmim_views(224)
    plain = {"jitter_probability": 0.0, "grayscale": 0.0, "blur": 0.0, "solarize": 0.0}
    assert has(view, size=224, scale=(0.2, 1.0), flip=0.5, interpolation="bicubic", **plain)
