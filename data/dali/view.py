"""One view: from the decoded image and the numbers of `data.views.draw` to the tensor that the model takes."""

from collections.abc import Callable, Mapping
from typing import Any

import nvidia.dali.math as dm
from nvidia.dali import fn, types

from data.color import Floats, blur_kernels, exact_parameters, fused_parameters
from data.dali.jitter import change_where, exact, fused
from data.dali.pixels import InterleavedPixels, Pixels, PlanarPixels
from data.dali.randaugment import layer_parameters, randaugment
from data.views import Column, ViewSpec

# ImageNet's channel statistics in gray levels.
MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)

_INTERPOLATION = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}
_CHANGES = {"fused": fused, "exact": exact}
_PARAMETERS = {"fused": fused_parameters, "exact": exact_parameters}


def input_names(spec: ViewSpec, on_gpu: bool) -> tuple[str, ...]:
    """Return which inputs the graph of a view takes. DALI warns of those that it gets in vain."""
    names = {
        "row": True,
        "parameters": _colored(spec),
        "layers": spec.randaugment > 0,
        "kernel": spec.blur > 0 and not on_gpu,
    }
    return tuple(name for name, taken in names.items() if taken)


def view_inputs(spec: ViewSpec, rows: Floats, color: str, on_gpu: bool = False) -> list[Any]:
    """Return the inputs of a view for n samples: arrays [n, any]; the kernels as a list, each as long as it is."""
    make: dict[str, Callable[[Floats], Any]]
    make = {
        "row": lambda rows: rows,
        "parameters": _PARAMETERS[color],
        "layers": lambda rows: layer_parameters(rows[:, len(Column) :], spec.size),
        "kernel": blur_kernels,
    }
    return [make[name](rows) for name in input_names(spec, on_gpu)]


def make_view(image: Any, inputs: Mapping[str, Any], spec: ViewSpec, color: str) -> Any:
    """Return a view, float32 [3, S, S], on the device of the image. ``inputs``: by the names of `input_names`."""
    row = inputs["row"]
    view = _crop_around(image, row, spec) if color == "fused" else _crop(image, row, spec)
    pixels: Pixels = InterleavedPixels() if image.device == "gpu" else PlanarPixels(spec.size)
    if _colored(spec) or spec.randaugment > 0:
        view = pixels.arrange(view)
    if spec.randaugment > 0:
        view = randaugment(view, inputs["layers"], pixels)
    if _colored(spec):
        view = _CHANGES[color](view, row, inputs["parameters"], spec, pixels)
    if spec.blur > 0:
        sigma, kernel = row[Column.SIGMA], inputs.get("kernel")
        view = change_where(sigma > 0, view, lambda some: pixels.blur(some, kernel, sigma))
    if spec.solarize > 0:
        view = change_where(row[Column.SOLARIZE] > 0, view, _solarize)
    return _normalize(view, row)


def _colored(spec: ViewSpec) -> bool:
    return spec.jitter_probability > 0 or spec.grayscale > 0


def _crop(image: Any, row: Any, spec: ViewSpec) -> Any:
    """Cut, then resize."""
    box = fn.cast(row[Column.TOP : Column.FLIP], dtype=types.INT32)
    return _resize(fn.slice(image, start=box[0:2], shape=box[2:4], axes=(0, 1)), spec)


def _crop_around(image: Any, row: Any, spec: ViewSpec) -> Any:
    """Resize a region of the image, whose outermost pixels are mixed with those around it: saves a copy."""
    start = row[Column.TOP : Column.HEIGHT]
    return _resize(image, spec, roi_start=start, roi_end=start + row[Column.HEIGHT : Column.FLIP])


def _resize(image: Any, spec: ViewSpec, **region: Any) -> Any:
    interpolation = _INTERPOLATION[spec.interpolation]
    return fn.resize(image, size=(spec.size, spec.size), interp_type=interpolation, antialias=True, **region)


def _solarize(view: Any) -> Any:
    """Invert the levels of 128 and above: of a level and its inverse, the darker one."""
    return dm.min(view, types.Constant(255, dtype=types.UINT8) - view)


def _normalize(view: Any, row: Any) -> Any:
    return fn.crop_mirror_normalize(
        view,
        mean=MEAN,
        std=STD,
        mirror=fn.cast(row[Column.FLIP], dtype=types.INT32),
        dtype=types.FLOAT,
        output_layout="CHW",
    )
