"""A view's law in torchvision's words, written from the same `ViewSpec` as ours, so that the two cannot drift apart."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode, v2

from data.views import ViewSpec

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SOLARIZE_THRESHOLD = 128

Transform = Callable[[Any], torch.Tensor]


class PILBlur:
    """Gaussian blur with a random radius on a PIL image, as MoCo's and DINO's own code have it."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the blurred image."""
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self.sigma)))


class PILSolarize:
    """Invert the levels of 128 and above of a PIL image."""

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the solarized image."""
        return ImageOps.solarize(image, SOLARIZE_THRESHOLD)


def v1_pil(spec: ViewSpec) -> Transform:
    """Return torchvision's first transforms on PIL images, with PIL's own blur: what MoCo-v3's code does."""
    steps: list[Any] = [v1.RandomResizedCrop(spec.size, spec.scale, spec.ratio, _interpolation(spec))]
    steps += _sometimes(v1, spec.jitter_probability, lambda: v1.ColorJitter(*spec.jitter))
    steps += [v1.RandomGrayscale(spec.grayscale)] if spec.grayscale else []
    steps += _sometimes(v1, spec.blur, lambda: PILBlur(spec.blur_sigma))
    steps += _sometimes(v1, spec.solarize, PILSolarize)
    steps += [v1.RandomHorizontalFlip(spec.flip), v1.ToTensor(), v1.Normalize(MEAN, STD)]
    return _composed(v1, steps)


def v2_pil(spec: ViewSpec) -> Transform:
    """Return torchvision's second transforms on PIL images, with PIL's own blur, several times as fast as theirs."""
    return _v2(spec, lambda: PILBlur(spec.blur_sigma))


def v2_tensor(spec: ViewSpec) -> Transform:
    """Return torchvision's second transforms on uint8 tensors [3, H, W]."""
    # The smallest window that holds three sigmas; the usual 23 pixels would take four times as long.
    window = 2 * math.ceil(3 * spec.blur_sigma[1]) + 1
    return _v2(spec, lambda: v2.GaussianBlur(window, spec.blur_sigma))


def _v2(spec: ViewSpec, blur: Callable[[], Any]) -> Transform:
    steps: list[Any] = [v2.RandomResizedCrop(spec.size, spec.scale, spec.ratio, _interpolation(spec), antialias=True)]
    steps += _sometimes(v2, spec.jitter_probability, lambda: v2.ColorJitter(*spec.jitter))
    steps += [v2.RandomGrayscale(spec.grayscale)] if spec.grayscale else []
    steps += _sometimes(v2, spec.blur, blur)
    steps += [v2.RandomSolarize(SOLARIZE_THRESHOLD, spec.solarize)] if spec.solarize else []
    steps += [v2.RandomHorizontalFlip(spec.flip), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    return _composed(v2, [*steps, v2.Normalize(MEAN, STD)])


def _composed(library: Any, steps: list[Any]) -> Transform:
    transform: Transform = library.Compose(steps)
    return transform


def _sometimes(library: Any, probability: float, change: Callable[[], Any]) -> list[Any]:
    """Return a step that is taken with a probability; none at all where it never is."""
    return [library.RandomApply([change()], probability)] if probability else []


def _interpolation(spec: ViewSpec) -> InterpolationMode:
    assert spec.crop == "random", "the peers have no center crop"
    return InterpolationMode(spec.interpolation)
