"""A safetensors file written tensor by tensor: memory holds one of them at a time.

The library's own writer wants all tensors at once. The format is a length, a JSON header, and the bytes in order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 8
_FP32_BYTES = 4


@dataclass(frozen=True)
class Promised:
    """A tensor in fp32 whose name and shape are known before it is made."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def write_tensors(path: Path, tensors: Sequence[Promised]) -> None:
    """Write tensors as one safetensors file, each made when its turn comes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for each in tensors:
        begin, end = end, end + _FP32_BYTES * int(np.prod(each.shape))
        header[each.name] = {"dtype": "F32", "shape": list(each.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for each in tensors:
            file.write(_bytes(each))


def map_tensors(path: Path, tensors: Sequence[Promised]) -> dict[str, Tensor]:
    """Return what `write_tensors` wrote, left on the disk until it is used; changes stay in memory."""
    with path.open("rb") as file:
        offset = 8 + int.from_bytes(file.read(8), "little")
    mapped = {}
    # One map each: torch.save writes all of the memory that a tensor is a view of.
    for each in tensors:
        array = np.memmap(path, np.float32, "c", offset, each.shape)
        mapped[each.name] = torch.from_numpy(array)
        offset += array.nbytes
    return mapped


def _bytes(promised: Promised) -> memoryview:
    tensor = promised.make().detach()
    assert tuple(tensor.shape) == promised.shape, f"{promised.name}: {list(tensor.shape)}, not {promised.shape}"
    assert tensor.dtype == torch.float32, promised.name
    return tensor.contiguous().numpy().data
