"""The peer of decoding: DALI with its own readers, in C++, in place of our order and our reading.

Beside `data/dali/` the only file that imports DALI: a reader of the library's own is what ours is measured against,
so it has no place behind our door.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from nvidia.dali import fn, pipeline_def

from data.dali.pipeline import Decoding, decode
from data.manifest import index_path
from pipeline.benchmarks.timing import Stream

_SHUFFLE = 1000


def webdataset_reader_batches(tars: Sequence[Path], *, batch_size: int, threads: int, device: torch.device) -> Stream:
    """Yield decoded batches that DALI reads from tars by their indexes."""

    def read() -> Any:
        return fn.readers.webdataset(
            paths=[str(tar) for tar in tars],
            index_paths=[str(index_path(tar)) for tar in tars],
            ext=["jpg"],
            **_order(),
        )

    yield from _decoded_batches(read, batch_size, threads, device)


def file_reader_batches(files: Sequence[Path], *, batch_size: int, threads: int, device: torch.device) -> Stream:
    """Yield decoded batches that DALI reads from single files."""

    def read() -> Any:
        images, _ = fn.readers.file(files=[str(file) for file in files], **_order())
        return images

    yield from _decoded_batches(read, batch_size, threads, device)


def _order() -> dict[str, Any]:
    return {"random_shuffle": True, "initial_fill": _SHUFFLE, "seed": 0, "name": "reader"}


def _decoded_batches(read: Callable[[], Any], batch_size: int, threads: int, device: torch.device) -> Stream:
    on_gpu = device.type == "cuda"

    def graph() -> Any:
        return decode(read(), on_gpu, Decoding())

    pipeline = pipeline_def(
        graph,
        batch_size=batch_size,
        num_threads=threads,
        device_id=(device.index or 0) if on_gpu else None,
        exec_dynamic=True,
    )()
    pipeline.build()
    while True:
        yield pipeline.run()
