"""The DALI door: encoded images and parameter rows in, normalized views out, on the GPU or the CPU.

DALI decodes each image once and makes all its views by the same graph on both devices. It holds no random
state: every number that shapes a pixel comes in a row of `data.views.draw`.

Known differences from torchvision on PIL images: jitter always runs in the order brightness, contrast,
saturation, hue; hue rotates chroma in YIQ, which keeps the luma, where torchvision rotates HSV.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from data.views import Column, ViewSpec

# ImageNet's channel statistics in gray levels.
MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)

_INTERPOLATION = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


@dataclass(frozen=True)
class Encoded:
    """What one batch is made of.

    images: n encoded images, uint8 [bytes]; rows: per view, float32 [n, len(Column)]; tags: int64 [n, any],
    carried through to the output untouched.
    """

    images: list[NDArray[np.uint8]]
    rows: tuple[NDArray[np.float32], ...]
    tags: NDArray[np.int64]


class ViewPipeline:
    """Iterate over (views, tags): per view float32 [B, 3, S, S] on ``device``; tags int64 [B, any] on the CPU.

    ``source`` is called once per batch, in the thread that iterates, ``prefetch`` batches ahead; it raises
    StopIteration after the last. Any other exception of it reaches the caller. An image that DALI cannot
    decode raises RuntimeError. After an exception the pipeline is of no more use.
    """

    def __init__(
        self,
        specs: Sequence[ViewSpec],
        source: Callable[[], Encoded],
        *,
        batch_size: int,
        device: torch.device,
        threads: int,
        prefetch: int = 2,
    ) -> None:
        self._pipe: Any = build_graph(specs, source, batch_size, device, threads, prefetch)
        self._pipe.build()
        self._started = False

    def __iter__(self) -> "ViewPipeline":
        return self

    def __next__(self) -> tuple[tuple[Tensor, ...], Tensor]:
        if not self._started:
            self._pipe.schedule_run()
            self._started = True
        # The dynamic executor gives every batch its own buffers, so tensors stay valid after the release.
        *views, tags = (from_dlpack(output.as_tensor()) for output in self._pipe.share_outputs())
        self._pipe.release_outputs()
        self._pipe.schedule_run()
        return tuple(views), tags

    def close(self) -> None:
        """Free DALI's threads and buffers."""
        self._pipe = None


def build_graph(
    specs: Sequence[ViewSpec],
    source: Callable[[], Encoded],
    batch_size: int,
    device: torch.device,
    threads: int,
    prefetch: int,
) -> Any:
    """Define the pipeline; building it, which needs the device, is left to the caller."""
    on_gpu = device.type == "cuda"

    def feed() -> tuple[Any, ...]:
        batch = source()
        return (batch.images, *batch.rows, batch.tags)

    def graph() -> tuple[Any, ...]:
        dtypes = [types.UINT8, *(types.FLOAT for _ in specs), types.INT64]
        encoded, *rows, tags = fn.external_source(
            source=feed, num_outputs=len(dtypes), dtype=dtypes, ndim=[1] * len(dtypes), batch=True
        )
        image = fn.decoders.image(
            encoded,
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,
        )
        return (*(_view(image, rows[k], spec) for k, spec in enumerate(specs)), tags)

    define = pipeline_def(
        graph,
        batch_size=batch_size,
        num_threads=threads,
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=prefetch,
        exec_dynamic=True,
        enable_conditionals=True,
    )
    return define()


# Images live on either device, rows and operators' named arguments on the CPU.


def _view(image: Any, row: Any, spec: ViewSpec) -> Any:
    view = _crop(image, row, spec)
    if spec.jitter_probability > 0:
        view = _change_where(row[Column.JITTER] > 0, view, lambda some: _jitter(some, row))
    if spec.grayscale > 0:
        view = _change_where(row[Column.GRAYSCALE] > 0, view, _grayscale)
    if spec.blur > 0:
        sigma = row[Column.SIGMA]
        view = _change_where(sigma > 0, view, lambda some: fn.gaussian_blur(some, sigma=sigma))
    if spec.solarize > 0:
        view = _change_where(row[Column.SOLARIZE] > 0, view, _solarize)
    return fn.crop_mirror_normalize(
        view,
        mean=MEAN,
        std=STD,
        mirror=fn.cast(row[Column.FLIP], dtype=types.INT32),
        dtype=types.FLOAT,
        output_layout="CHW",
    )


def _change_where(on: Any, view: Any, change: Callable[[Any], Any]) -> Any:
    """Change the samples of the batch for which ``on`` holds; only those pay for it."""
    # DALI reads this statement as a split of the batch and a merge; it does not read a conditional expression.
    if on:  # noqa: SIM108
        out = change(view)
    else:
        out = view
    return out


def _crop(image: Any, row: Any, spec: ViewSpec) -> Any:
    """Cut, then resize: a resize of a region of interest would look at the pixels around it."""
    box = fn.cast(row[Column.TOP : Column.FLIP], dtype=types.INT32)
    cut = fn.slice(image, start=box[0:2], shape=box[2:4], axes=(0, 1))
    return fn.resize(cut, size=(spec.size, spec.size), interp_type=_INTERPOLATION[spec.interpolation], antialias=True)


def _jitter(view: Any, row: Any) -> Any:
    """Change brightness, contrast about the mean luma, saturation, hue; rounded to gray levels in between."""
    bright = fn.brightness(view, brightness=row[Column.BRIGHTNESS])
    mean_luma = fn.reductions.mean(_luma(bright)).cpu()
    contrasted = fn.brightness_contrast(bright, contrast=row[Column.CONTRAST], contrast_center=mean_luma)
    return fn.hsv(contrasted, saturation=row[Column.SATURATION], hue=row[Column.HUE])


def _grayscale(view: Any) -> Any:
    """Replace the colors by luma; a saturation of zero would leave traces of color."""
    luma = _luma(view)
    return fn.cat(luma, luma, luma, axis=2)


def _solarize(view: Any) -> Any:
    """Invert the levels of 128 and above."""
    return fn.cast((view >= 128) * (255 - view) + (view < 128) * view, dtype=types.UINT8)


def _luma(view: Any) -> Any:
    return fn.color_space_conversion(view, image_type=types.RGB, output_type=types.GRAY)
