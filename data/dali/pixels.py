"""The few things done to pixels, in the arrangement that each device does fastest.

On the CPU views are planes, [3, S, S]: DALI's correlation (`fn.filter`) is vectorized there, and correlating across the
planes mixes colors in a third of the time of the operators made for it. On the GPU views stay interleaved,
[S, S, 3]. Operators' named arguments live on the CPU whatever the device; a mean of pixels does not.
"""

from typing import Any, Protocol

import numpy as np
from nvidia.dali import fn, types

from data.color import TRUNCATION

_LEVELS = 255.0
_PACKED_FROM = 128  # pixels of a side


class Pixels(Protocol):
    """What changes of color and blur are made of. Views are uint8; results are rounded and clipped to that."""

    def arrange(self, view: Any) -> Any:
        """Bring a view [S, S, 3] into this arrangement."""
        ...

    def channels(self, view: Any) -> list[Any]:
        """Return red, green and blue."""
        ...

    def join(self, channels: list[Any]) -> Any:
        """Undo `channels`."""
        ...

    def pack(self, channel: Any) -> Any:
        """Return a channel for sums and differences, whose results have to be levels, 0 to 255, themselves."""
        ...

    def unpack(self, packed: Any) -> Any:
        """Undo `pack`."""
        ...

    def tone(self, view: Any, brightness: Any, contrast: Any, center: Any, shift: Any = 0.0) -> Any:
        """Return shift + brightness (center + contrast (view - center)), all in gray levels."""
        ...

    def mix(self, view: Any, weights: list[Any], shifted: bool = False) -> Any:
        """Make each channel a weighted sum of all: for each 3 numbers, or 4 with a gray level that is added."""
        ...

    def luma(self, view: Any, weights: Any, shifted: bool = False) -> Any:
        """Return the one channel of weighted sums: 3 numbers, or 4 with a gray level that is added."""
        ...

    def blur(self, view: Any, kernel: Any, sigma: Any) -> Any:
        """Blur by a Gaussian; its one-dimensional kernel and its sigma in pixels say the same."""
        ...

    def filter(self, view: Any, kernel: Any, offset: Any) -> Any:
        """Correlate every channel with a kernel [k, k], and add the offset, a gray level."""
        ...

    def warp(self, view: Any, matrix: Any, fill: tuple[int, int, int]) -> Any:
        """Take every pixel from where a matrix [2, 3] says, truncated as in PIL; ``fill``: the color from outside."""
        ...

    def equalize(self, view: Any) -> Any:
        """Equalize the histogram of each channel."""
        ...


class PlanarPixels:
    """Views as planes, [3, size, size], on the CPU."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._ones = np.ones((1, size, size), np.uint8)
        # Of a smaller plane, the operators around it cost more than is saved.
        self._packs = size >= _PACKED_FROM and size * size % 8 == 0

    def arrange(self, view: Any) -> Any:
        return fn.transpose(view, perm=[2, 0, 1])

    def channels(self, view: Any) -> list[Any]:
        return [view[k : k + 1] for k in range(3)]

    def join(self, channels: list[Any]) -> Any:
        return fn.reshape(fn.cat(*channels, axis=0), layout="CHW")

    def pack(self, channel: Any) -> Any:
        # DALI adds a number of eight bytes as fast as one of one. Levels that stay levels carry nothing over.
        return fn.reinterpret(channel, dtype=types.UINT64, shape=[1, -1]) if self._packs else channel

    def unpack(self, packed: Any) -> Any:
        shape = [1, self._size, self._size]
        return fn.reinterpret(packed, dtype=types.UINT8, shape=shape) if self._packs else packed

    def tone(self, view: Any, brightness: Any, contrast: Any, center: Any, shift: Any = 0.0) -> Any:
        # The operator insists on channels that come last, though it treats all numbers alike.
        changed = fn.brightness_contrast(
            fn.reshape(view, layout="HWC"),
            brightness=brightness,
            brightness_shift=shift / _LEVELS,
            contrast=contrast,
            contrast_center=center,
        )
        return fn.reshape(changed, layout="CHW")

    def mix(self, view: Any, weights: list[Any], shifted: bool = False) -> Any:
        planes = self._as_rows(view, shifted)
        rows = [_correlate(planes, each) for each in weights]
        return fn.reshape(fn.cat(*rows, axis=0), shape=[3, self._size, self._size], layout="CHW")

    def luma(self, view: Any, weights: Any, shifted: bool = False) -> Any:
        row = _correlate(self._as_rows(view, shifted), weights)
        return fn.reshape(row, shape=[1, self._size, self._size], layout="CHW")

    def blur(self, view: Any, kernel: Any, sigma: Any) -> Any:
        across = fn.filter(view, fn.expand_dims(kernel, axes=[0]))
        return fn.filter(across, fn.expand_dims(kernel, axes=[1]))

    def filter(self, view: Any, kernel: Any, offset: Any) -> Any:
        return fn.cast(fn.filter(view, kernel, dtype=types.FLOAT) + offset, dtype=types.UINT8)

    def warp(self, view: Any, matrix: Any, fill: tuple[int, int, int]) -> Any:
        size = self._size
        planes = [fn.reshape(each, shape=[size, size, 1], layout="HWC") for each in self.channels(view)]
        # DALI rewrites this code, and its zip knows no strict.
        warped = [_warped(planes[k], matrix, fill[k]) for k in range(3)]
        return self.join([fn.reshape(each, shape=[1, size, size], layout="CHW") for each in warped])

    def equalize(self, view: Any) -> Any:
        return self.arrange(fn.equalize(fn.transpose(view, perm=[1, 2, 0])))

    def _as_rows(self, view: Any, shifted: bool) -> Any:
        """Return an image with a plane per row, and one of ones for the level that is added."""
        if shifted:
            view = fn.cat(view, types.Constant(self._ones, device="cpu"), axis=0)
        return fn.reshape(view, shape=[-1, self._size * self._size], layout="HW")


def _correlate(rows: Any, weights: Any) -> Any:
    return fn.filter(rows, fn.expand_dims(weights, axes=[1]), mode="valid")


class InterleavedPixels:
    """Views as they come, [S, S, 3], on the GPU; the CPU can do all of this too, only slower."""

    def arrange(self, view: Any) -> Any:
        return view

    def channels(self, view: Any) -> list[Any]:
        return [view[:, :, k : k + 1] for k in range(3)]

    def join(self, channels: list[Any]) -> Any:
        return fn.cat(*channels, axis=2)

    def pack(self, channel: Any) -> Any:
        return channel

    def unpack(self, packed: Any) -> Any:
        return packed

    def tone(self, view: Any, brightness: Any, contrast: Any, center: Any, shift: Any = 0.0) -> Any:
        # A center made of pixels is on the GPU: as an argument of an operator it would have to come to the CPU first.
        brightness, contrast, shift = (beside(view, each) for each in (brightness, contrast, shift))
        return fn.cast(brightness * (center + contrast * (view - center)) + shift, dtype=types.UINT8)

    def mix(self, view: Any, weights: list[Any], shifted: bool = False) -> Any:
        # Matrix and offset as one argument, or the matrix alone.
        matrix = {"MT" if shifted else "M": fn.stack(*weights)}
        return fn.coord_transform(view, dtype=types.UINT8, **matrix)

    def luma(self, view: Any, weights: Any, shifted: bool = False) -> Any:
        return self.mix(view, [weights], shifted)

    def blur(self, view: Any, kernel: Any, sigma: Any) -> Any:
        return fn.gaussian_blur(view, sigma=sigma)

    def filter(self, view: Any, kernel: Any, offset: Any) -> Any:
        filtered = fn.filter(view, beside(view, kernel), dtype=types.FLOAT)
        return fn.cast(filtered + beside(view, offset), dtype=types.UINT8)

    def warp(self, view: Any, matrix: Any, fill: tuple[int, int, int]) -> Any:
        channels = self.channels(view)
        return self.join([_warped(channels[k], matrix, fill[k]) for k in range(3)])

    def equalize(self, view: Any) -> Any:
        return fn.equalize(view)


def _warped(channel: Any, matrix: Any, fill: int) -> Any:
    """Warp one channel [S, S, 1]; each has a fill of its own, of which DALI's operator takes one number."""
    # In float, which is faster than rounding; a whole number survives the truncation.
    warped = fn.warp_affine(channel, matrix=matrix, inverse_map=True, fill_value=fill, dtype=types.FLOAT)
    return fn.cast(warped - TRUNCATION, dtype=types.UINT8)


def beside(view: Any, number: Any) -> Any:
    """Return the number, one of Python's or one per sample on the CPU, for arithmetic with the view."""
    if isinstance(number, float) or view.device == "cpu":
        return number
    return number.gpu()
