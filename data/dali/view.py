"""One view: from the decoded image and the numbers of `data.views.draw` to the tensor that the model takes."""

from typing import Any

import numpy as np
import nvidia.dali.math as dm
from nvidia.dali import fn, types

from data.color import Floats, blur_kernels, exact_parameters, fused_parameters
from data.dali.jitter import Numbers, change_where, exact, fused, hue_passes
from data.dali.pixels import InterleavedPixels, Pixels, PlanarPixels
from data.dali.randaugment import layer_parameters, randaugment
from data.views import Column, ViewSpec

# ImageNet's channel statistics in gray levels.
MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)

_INTERPOLATION = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
_CHANGES = {"fused": fused, "exact": exact}


def view_inputs(spec: ViewSpec, rows: Floats, color: str, on_gpu: bool = False) -> dict[str, Any]:
    """Return the inputs of a view for n samples, by name: arrays [n, ...], the kernels a list of arrays.

    To take a number out of an array costs the graph three times as much as an input of its own.
    """
    top_left, size = rows[:, Column.TOP : Column.HEIGHT], rows[:, Column.HEIGHT : Column.FLIP]
    found: dict[str, Any] = {"mirror": rows[:, Column.FLIP].astype(np.int32)}
    if color == "fused":
        found |= {"start": top_left, "end": top_left + size}
    else:
        found |= {"start": top_left.astype(np.int32), "shape": size.astype(np.int32)}
    if spec.randaugment > 0:
        found["layers"] = layer_parameters(rows[:, len(Column) :], spec.size)
    if _colored(spec):
        parameters = fused_parameters(rows) if color == "fused" else exact_parameters(rows, hue_passes(spec))
        found |= {name: each.astype(np.float32) for name, each in parameters.items()}
    if spec.blur > 0:
        found |= {"sigma": rows[:, Column.SIGMA]} | ({} if on_gpu else {"kernel": blur_kernels(rows)})
    if spec.solarize > 0:
        found["solarize"] = rows[:, Column.SOLARIZE]
    # DALI takes arrays only as they lie in memory.
    return {name: each if isinstance(each, list) else np.ascontiguousarray(each) for name, each in found.items()}


def make_view(image: Any, inputs: Numbers, spec: ViewSpec, color: str) -> Any:
    """Return a view, float32 [3, S, S], on the device of the image. ``inputs``: by the names of `view_inputs`."""
    view = _crop_around(image, inputs, spec) if color == "fused" else _crop(image, inputs, spec)
    pixels: Pixels = InterleavedPixels() if image.device == "gpu" else PlanarPixels(spec.size)
    if _colored(spec) or spec.randaugment > 0:
        view = pixels.arrange(view)
    if spec.randaugment > 0:
        view = randaugment(view, inputs["layers"], pixels)
    if _colored(spec):
        view = _CHANGES[color](view, inputs, spec, pixels)
    if spec.blur > 0:
        sigma, kernel = inputs["sigma"], inputs.get("kernel")
        view = change_where(sigma, view, lambda some: pixels.blur(some, kernel, sigma))
    if spec.solarize > 0:
        view = change_where(inputs["solarize"], view, _solarize)
    return _normalize(view, inputs["mirror"])


def _colored(spec: ViewSpec) -> bool:
    return spec.jitter_probability > 0 or spec.grayscale > 0


def _crop(image: Any, inputs: Numbers, spec: ViewSpec) -> Any:
    """Cut, then resize."""
    return _resize(fn.slice(image, start=inputs["start"], shape=inputs["shape"], axes=(0, 1)), spec)


def _crop_around(image: Any, inputs: Numbers, spec: ViewSpec) -> Any:
    """Resize a region of the image, whose outermost pixels are mixed with those around it: saves a copy."""
    return _resize(image, spec, roi_start=inputs["start"], roi_end=inputs["end"])


def _resize(image: Any, spec: ViewSpec, **region: Any) -> Any:
    interpolation = _INTERPOLATION[spec.interpolation]
    return fn.resize(image, size=(spec.size, spec.size), interp_type=interpolation, antialias=True, **region)


def _solarize(view: Any) -> Any:
    """Invert the levels of 128 and above: of a level and its inverse, the darker one."""
    return dm.min(view, types.Constant(255, dtype=types.UINT8) - view)


def _normalize(view: Any, mirror: Any) -> Any:
    return fn.crop_mirror_normalize(
        view,
        mean=MEAN,
        std=STD,
        mirror=mirror,
        dtype=types.FLOAT,
        output_layout="CHW",
    )
