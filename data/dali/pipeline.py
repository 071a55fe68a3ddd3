"""The pipeline: decode once, make all views, ahead of the one who iterates."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from data.dali.view import make_view, view_inputs
from data.views import ViewSpec, draw

COLORS = ("fused", "exact")
"""The ways to change colors; see `data.dali.jitter`."""

# Decoders reserve this much at most for one image: 16 Mpx in RGB are 48 MB a thread. Larger ones still decode.
_RESERVED_PIXELS = 1 << 24


@dataclass(frozen=True)
class Encoded:
    """What one batch is made of.

    images: n encoded images, uint8 [bytes]; rows: per view, float32 [n, len(Column)]; tags: int64 [n, any],
    carried through to the output untouched.
    """

    images: list[NDArray[np.uint8]]
    rows: tuple[NDArray[np.float32], ...]
    tags: NDArray[np.int64]


@dataclass(frozen=True)
class Decoding:
    """How the GPU decodes. The CPU takes no notice.

    hardware_share: part of the images for the JPEG engine, 0 to 1; largest: height and width to reserve memory for,
    (0, 0) = none.
    """

    hardware_share: float = 0.65
    largest: tuple[int, int] = (0, 0)

    def reserved(self) -> tuple[int, int]:
        """Return the height and width to reserve, shrunk where a single huge image would take gigabytes."""
        height, width = self.largest
        shrink = min(1.0, math.sqrt(_RESERVED_PIXELS / max(1, height * width)))
        return int(height * shrink), int(width * shrink)


class ViewPipeline:
    """Iterate over (views, tags): per view float32 [B, 3, S, S] on ``device``; tags int64 [B, any] on the CPU.

    Without specs the images are decoded all the same. ``source`` is called once per batch, in the thread that
    iterates, ``prefetch`` batches ahead; it raises StopIteration after the last. Any other exception of it reaches
    the caller. An image that DALI cannot decode raises RuntimeError. After an exception the pipeline is of no more
    use, but another can be made.
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
        color: str = "fused",
        decoding: Decoding | None = None,
    ) -> None:
        self._count = len(specs)
        self._device = device
        self._pipe: Any = build_graph(
            specs, source, batch_size, device, threads, prefetch, color, decoding or Decoding()
        )
        self._pipe.build()
        self._started = False

    def __iter__(self) -> "ViewPipeline":
        return self

    def __next__(self) -> tuple[tuple[Tensor, ...], Tensor]:
        if not self._started:
            self._pipe.schedule_run()
            self._started = True
        # Bound to torch's stream, outputs are ready in its order, and freed in it; nobody waits on the host.
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        outputs = self._pipe.share_outputs(stream)[: self._count + 1]
        # The dynamic executor gives every batch its own buffers, so tensors stay valid after the release.
        *views, tags = (from_dlpack(output.as_tensor()) for output in outputs)
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
    color: str,
    decoding: Decoding,
) -> Any:
    """Define the pipeline; building it, which needs the device, is left to the caller."""
    assert color in COLORS, color
    on_gpu = device.type == "cuda"

    # What a view takes, by the example of one sample.
    examples = [view_inputs(spec, _example_row(spec), color, on_gpu) for spec in specs]

    def feed() -> tuple[Any, ...]:
        batch = source()
        pairs = zip(specs, batch.rows, strict=True)
        views = [each for spec, rows in pairs for each in view_inputs(spec, rows, color, on_gpu).values()]
        return (batch.images, *views, batch.tags)

    def graph() -> tuple[Any, ...]:
        first = [np.asarray(each[0]) for example in examples for each in example.values()]
        dtypes = [types.UINT8, *[types.to_dali_type(each.dtype) for each in first], types.INT64]
        encoded, *numbers, tags = fn.external_source(
            source=feed, num_outputs=len(dtypes), dtype=dtypes, ndim=[1, *[each.ndim for each in first], 1], batch=True
        )
        image = decode(encoded, on_gpu, decoding)
        views = []
        for k in range(len(specs)):
            inputs = {name: numbers.pop(0) for name in examples[k]}
            views.append(make_view(image, inputs, specs[k], color))
        # An operator whose output nobody asks for does not run: without views, ask for a pixel.
        return (*views, tags) if views else (tags, fn.slice(image, start=(0, 0), shape=(1, 1), axes=(0, 1)))

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


def _example_row(spec: ViewSpec) -> NDArray[np.float32]:
    side, zero = np.array([spec.size]), np.array([0])
    return draw(spec, seed=0, epoch=zero, sample=zero, view=0, heights=side, widths=side)


def decode(encoded: Any, on_gpu: bool, decoding: Decoding) -> Any:
    """Decode to RGB as torchvision does: chroma upsampled smoothly, no rotation by EXIF."""
    height, width = decoding.reserved()
    hardware: dict[str, Any] = {
        "hw_decoder_load": decoding.hardware_share,
        "preallocate_height_hint": height,
        "preallocate_width_hint": width,
    }
    return fn.decoders.image(
        encoded,
        device="mixed" if on_gpu else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
        **(hardware if on_gpu else {}),
    )
