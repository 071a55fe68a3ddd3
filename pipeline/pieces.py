"""Named tensors in files, in pieces: each process writes the stretches that it holds and reads those that it needs.

How many processes wrote, and which stretch each of them had, does not matter to who reads. The files are safetensors:
numbers and names, no code.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SUFFIX = ".safetensors"
_SHAPES, _FACTS = "shapes", "facts"


@dataclass(frozen=True)
class Piece:
    """A stretch of a named tensor as this process has it, flat; `start` counts elements of the whole, flattened."""

    name: str
    shape: tuple[int, ...]
    start: int
    data: Tensor
    # Whether all processes have the same one, of which one copy is enough.
    replicated: bool = False

    @classmethod
    def whole(cls, name: str, tensor: Tensor) -> Piece:
        """Return a tensor that all processes have."""
        return cls(name, tuple(tensor.shape), 0, tensor.detach().reshape(-1), replicated=True)

    @property
    def num_bytes(self) -> int:
        """Return the size of what is held."""
        return self.data.numel() * self.data.element_size()


def shared_out(pieces: Iterable[Piece], rank: int, world_size: int) -> list[Piece]:
    """Return what one of the processes has to write, so that each writes its part of what all of them have."""
    kept, replicated = [], 0
    for piece in pieces:
        mine = not piece.replicated or replicated % world_size == rank
        replicated += piece.replicated
        if mine and piece.data.numel():
            kept.append(piece)
    return kept


class HostCopies:
    """Memory of the host that copies of pieces use again and again: it is mapped, and pinned, only once."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def copy(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Return the pieces as they are now; the next call overwrites what this one returned."""
        previous, self._buffers = self._buffers, {}
        copies = []
        for piece in pieces:
            buffer = previous.pop((piece.name, piece.start), None)
            if buffer is None or buffer.shape != piece.data.shape or buffer.dtype != piece.data.dtype:
                buffer = torch.empty_like(piece.data, device="cpu", pin_memory=piece.data.is_cuda)
            buffer.copy_(piece.data, non_blocking=True)
            self._buffers[piece.name, piece.start] = buffer
            copies.append(replace(piece, data=buffer))
        if any(piece.data.is_cuda for piece in pieces):
            torch.cuda.synchronize()
        return copies


def write(path: Path, pieces: Iterable[Piece], facts: dict[str, Any]) -> None:
    """Write pieces, and facts that JSON can hold, as one file."""
    tensors, shapes = {}, {}
    for piece in pieces:
        tensors[f"{piece.start}:{piece.name}"] = piece.data.contiguous()
        shapes[piece.name] = piece.shape
    save_file(tensors, path, {_SHAPES: json.dumps(shapes), _FACTS: json.dumps(facts)})


class Reader:
    """The tensors of all files of a directory, whoever wrote them; nothing is read before it is asked for."""

    def __init__(self, directory: Path) -> None:
        """Open the files.

        Raises:
            ValueError: there are none, or one is damaged.
        """
        self._directory = directory
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[tuple[int, int, Any, str]]] = defaultdict(list)
        self.facts: dict[str, Any] = {}
        paths = sorted(directory.glob(f"*{SUFFIX}"))
        if not paths:
            raise ValueError(f"{directory} holds no tensors (*{SUFFIX}); it is no checkpoint of this version.")
        for path in paths:
            self._open(path)

    @property
    def names(self) -> set[str]:
        """Return the names of all tensors."""
        return set(self._shapes)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse a tensor that is not there, or of another shape.

        Raises:
            ValueError: so it is.
        """
        saved = self._shapes.get(name)
        if saved != shape:
            found = "does not have it" if saved is None else f"has {list(saved)}"
            raise ValueError(f"{self._directory} should have {name} of shape {list(shape)} and {found}.")

    def whole(self, name: str) -> Tensor:
        """Return a tensor as it was before it was cut.

        Raises:
            ValueError: some of it is in none of the files.
        """
        if name not in self._shapes:
            raise ValueError(f"{self._directory} lacks {name}; it is of another model or method.")
        shape = self._shapes[name]
        return self.read(name, 0, math.prod(shape)).reshape(shape)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return the elements [start, stop) of a flattened tensor.

        Raises:
            ValueError: some of them are in none of the files.
        """
        parts, reached = [], start
        for first, last, file, key in sorted(self._pieces[name], key=lambda each: each[:2]):
            if first <= reached < min(last, stop):
                until = min(last, stop)
                parts.append(file.get_slice(key)[reached - first : until - first])
                reached = until
        if reached < stop:
            raise ValueError(
                f"{self._directory} lacks elements {reached} to {stop} of {name}; take another checkpoint."
            )
        return torch.cat(parts) if parts else torch.empty(0)

    def _open(self, path: Path) -> None:
        try:
            file: Any = safe_open(path, framework="pt")
            metadata = file.metadata()
            self._shapes |= {name: tuple(shape) for name, shape in json.loads(metadata[_SHAPES]).items()}
            # The first process always holds something; the last may hold padding only, and know less.
            self.facts = json.loads(metadata[_FACTS]) | self.facts
        # Of a damaged header safetensors raises an exception of its own, and this one of another's metadata.
        except Exception as error:
            raise ValueError(f"{path} cannot be read ({error}); take another checkpoint.") from error
        for key in file.keys():  # noqa: SIM118 (it is no dict)
            start, _, name = key.partition(":")
            count = file.get_slice(key).get_shape()[0]
            self._pieces[name].append((int(start), int(start) + count, file, key))
