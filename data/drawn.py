"""An image set drawn on the spot: a wallpaper of one shape per class, on any machine, without a download.

Contrast, tint, size, position, rotation and ground vary from image to image and say nothing about the class, so
that pixels are a poor guide to it, while the shape is plain to the eye. Tints are faint and every crop holds the
shape for a reason: contrastive training matches vivid colors first, and a small encoder learns no shape in a few
hundred steps.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Plane = NDArray[np.float64]
Mask = NDArray[np.bool_]
# A shape tells which points belong to it; it fills most of the square [-1, 1] x [-1, 1].
Shape = Callable[[Plane, Plane], Mask]

OVERSAMPLING = 2
SPACING = 1.15  # side of a tile, in units of the shape's square
SATURATION = 0.12
QUALITY = 90


def draw_image_folder(output: Path, classes: int = 8, per_class: int = 150, size: int = 64, seed: int = 0) -> None:
    """Write ``class/000000.jpg``...: ``per_class`` JPEGs of size x size pixels for each of the first shapes.

    The same arguments draw the same pixels. Raises ValueError when there are fewer shapes than classes.
    """
    if not 1 <= classes <= len(SHAPES):
        raise ValueError(f"drawn.classes: must be 1 to {len(SHAPES)}, not {classes}.")
    for number, (name, shape) in enumerate(list(SHAPES.items())[:classes]):
        folder = Path(output) / name
        folder.mkdir(parents=True, exist_ok=True)
        for position in range(per_class):
            random = np.random.default_rng([seed, number, position])
            draw(shape, size, random).save(folder / f"{position:06d}.jpg", quality=QUALITY)


def draw(shape: Shape, size: int, random: np.random.Generator) -> Image.Image:
    """Return one RGB image [size, size] of the shape."""
    cover = _tiled(shape, size, random)[..., None]
    background, foreground = _colors(random)
    ground = background + _texture(size, random, strength=4.0)
    pixels = ground + cover * (foreground + _texture(size, random, strength=2.0) - ground)
    pixels += random.normal(0.0, 4.0, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _tiled(shape: Shape, size: int, random: np.random.Generator) -> Plane:
    """Return how much of every pixel [size, size] is covered by copies; scaled, turned and moved at random."""
    tiles, turn = random.uniform(1.8, 3.2), random.uniform(-math.pi / 6, math.pi / 6)
    axis = ((np.arange(size * OVERSAMPLING) + 0.5) / (size * OVERSAMPLING) * 2.0 - 1.0) * tiles
    along = math.cos(turn) * axis[None, :] + math.sin(turn) * axis[:, None]
    across = math.cos(turn) * axis[:, None] - math.sin(turn) * axis[None, :]
    moved = (plane + random.uniform(0.0, 2.0) for plane in (along, across))
    u, v = ((plane % 2.0 - 1.0) * SPACING for plane in moved)
    cover: Plane = shape(u, v).reshape(size, OVERSAMPLING, size, OVERSAMPLING).mean(axis=(1, 3))
    return cover


def _colors(random: np.random.Generator) -> tuple[Plane, Plane]:
    """Return two faintly tinted colors RGB [3] whose luma differs by at least 70 levels, either one the darker."""
    luma = np.array([0.299, 0.587, 0.114])
    while True:
        vivid = random.uniform(15.0, 240.0, (2, 3))
        gray = (vivid @ luma)[:, None]
        if abs(gray[0, 0] - gray[1, 0]) > 70.0:
            background, foreground = gray + SATURATION * (vivid - gray)
            return background, foreground


def _texture(size: int, random: np.random.Generator, strength: float) -> Plane:
    """Return a smooth random field of gray [size, size, 1] around zero: a gradient and blotches of some scale."""
    cells = int(random.integers(2, 9))
    blotches = _smooth(random.normal(0.0, 1.0, (cells, cells)), size)
    axis = np.linspace(-1.0, 1.0, size)
    slope = random.normal(0.0, 1.0, 2)
    field: Plane = strength * (blotches + axis[:, None] * slope[0] + axis[None, :] * slope[1])
    return field[..., None]


def _smooth(coarse: Plane, size: int) -> Plane:
    field = Image.fromarray(coarse.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(field, dtype=np.float64)


def _disc(u: Plane, v: Plane) -> Mask:
    return u**2 + v**2 < 0.8


def _ring(u: Plane, v: Plane) -> Mask:
    return np.abs(np.hypot(u, v) - 0.75) < 0.2


def _square(u: Plane, v: Plane) -> Mask:
    return np.maximum(np.abs(u), np.abs(v)) < 0.75


def _triangle(u: Plane, v: Plane) -> Mask:
    return (v < 0.65) & (np.abs(u) < (v + 0.95) * 0.58)


def _star(u: Plane, v: Plane) -> Mask:
    """Five points: the radius falls linearly in angle from a point to the notch beside it."""
    from_point = np.abs((np.arctan2(u, -v) * 5 / math.pi + 1.0) % 2.0 - 1.0)
    return np.hypot(u, v) < 1.0 - 0.6 * from_point**0.6


def _cross(u: Plane, v: Plane) -> Mask:
    inside: Mask = np.maximum(np.abs(u), np.abs(v)) < 0.95
    return inside & (np.minimum(np.abs(u), np.abs(v)) < 0.24)


def _bars(u: Plane, v: Plane) -> Mask:
    stripe: Mask = np.floor((v + 0.9) / 0.36) % 2 == 0
    return stripe & (np.maximum(np.abs(u), np.abs(v)) < 0.9)


def _crescent(u: Plane, v: Plane) -> Mask:
    return (u**2 + v**2 < 0.9) & ((u - 0.45) ** 2 + v**2 > 0.5)


def _checkers(u: Plane, v: Plane) -> Mask:
    tile: Mask = (np.floor((u + 0.9) / 0.6) + np.floor((v + 0.9) / 0.6)) % 2 == 0
    return tile & (np.maximum(np.abs(u), np.abs(v)) < 0.9)


def _dots(u: Plane, v: Plane) -> Mask:
    return (np.abs(u) - 0.5) ** 2 + (np.abs(v) - 0.5) ** 2 < 0.1


SHAPES: dict[str, Shape] = {
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "bars": _bars,
    "crescent": _crescent,
    "checkers": _checkers,
    "dots": _dots,
}
