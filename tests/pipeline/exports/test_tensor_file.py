"""Files of tensors that were never all in memory."""

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline.exports.tensor_file import Promised, map_tensors, write_tensors

TENSORS = {"b.weight": torch.randn(3, 5, 2), "a": torch.randn(7), "c.bias": torch.randn(1, 1), "d": torch.randn(2, 3).T}


def promised() -> list[Promised]:
    return [Promised(name, tuple(each.shape), lambda each=each: each) for name, each in TENSORS.items()]


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", promised())
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], each) for name, each in TENSORS.items())
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        # Readers of other libraries want to know whose tensors these are.
        assert file.metadata() == {"format": "pt"}


def test_maps_have_the_tensors_and_no_more(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", promised())
    mapped = map_tensors(tmp_path / "x.safetensors", promised())
    assert list(mapped) == list(TENSORS)
    for name, each in TENSORS.items():
        assert torch.equal(mapped[name], each)
        assert mapped[name].untyped_storage().nbytes() == each.numel() * 4
    mapped["a"].zero_()
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], TENSORS["a"])


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref] = []

    def make() -> torch.Tensor:
        assert not any(ref() is not None for ref in alive)
        # The memory itself, which others may hold when the tensor is gone.
        memory = np.zeros(4, np.float32)
        alive.append(weakref.ref(memory))
        return torch.from_numpy(memory)

    write_tensors(tmp_path / "x.safetensors", [Promised(str(i), (4,), make) for i in range(3)])
    assert len(alive) == 3


@pytest.mark.parametrize("tensor", [torch.zeros(4, 1), torch.zeros(4, dtype=torch.bfloat16)])
def test_a_broken_promise_is_no_file(tmp_path: Path, tensor: torch.Tensor) -> None:
    with pytest.raises(AssertionError, match="weight"):
        write_tensors(tmp_path / "x.safetensors", [Promised("weight", (4,), lambda: tensor)])
