"""Tensors in pieces: whoever wrote what, whoever reads what."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.pieces import HostCopies, Piece, Reader, shared_out, write


def cut(name: str, tensor: torch.Tensor, ends: list[int]) -> list[Piece]:
    edges = sorted({0, tensor.numel(), *(end % (tensor.numel() + 1) for end in ends)})
    flat = tensor.reshape(-1)
    return [Piece(name, tuple(tensor.shape), a, flat[a:b]) for a, b in pairwise(edges)]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    ends=st.lists(st.integers(0, 200), max_size=6),
    asked=st.tuples(st.integers(0, 200), st.integers(0, 200)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    order=st.randoms(use_true_random=False),
)
def test_any_stretch_is_read_whoever_wrote_the_pieces(
    tmp_path_factory: pytest.TempPathFactory,
    shape: list[int],
    ends: list[int],
    asked: tuple[int, int],
    dtype: torch.dtype,
    order: object,
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    tensor = torch.randn(shape).to(dtype)
    pieces = cut("a/b.c", tensor, ends)
    order.shuffle(pieces)  # type: ignore[attr-defined]
    for number, piece in enumerate(pieces):
        write(folder / f"rank_{number}.safetensors", [piece], {"number": number})
    reader = Reader(folder)
    start, stop = sorted(end % (tensor.numel() + 1) for end in asked)
    assert torch.equal(reader.read("a/b.c", start, stop), tensor.reshape(-1)[start:stop]) or start == stop
    assert torch.equal(reader.whole("a/b.c"), tensor)
    assert reader.whole("a/b.c").dtype == dtype


def test_what_is_in_no_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "rank_0.safetensors", [Piece("weight", (4, 2), 0, torch.zeros(3))], {})
    write(tmp_path / "rank_1.safetensors", [Piece("weight", (4, 2), 5, torch.zeros(3))], {})
    with pytest.raises(ValueError, match="lacks elements 3 to 8 of weight; take another checkpoint"):
        Reader(tmp_path).whole("weight")


def test_what_the_first_process_knows_counts(tmp_path: Path) -> None:
    for rank, steps in enumerate([{"heads": 5.0, "layer00": 5.0}, {"heads": 1.0}]):
        write(tmp_path / f"rank_{rank}.safetensors", [Piece(f"w{rank}", (1,), 0, torch.zeros(1))], {"steps": steps})
    assert Reader(tmp_path).facts["steps"] == {"heads": 5.0, "layer00": 5.0}


def test_another_shape_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "rank_0.safetensors", [Piece.whole("weight", torch.zeros(4, 2))], {})
    Reader(tmp_path).check("weight", (4, 2))
    with pytest.raises(ValueError, match=r"should have weight of shape \[2, 4\] and has \[4, 2\]"):
        Reader(tmp_path).check("weight", (2, 4))
    with pytest.raises(ValueError, match=r"should have bias of shape \[2\] and does not have it"):
        Reader(tmp_path).check("bias", (2,))


def test_a_directory_of_something_else_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no tensors .* it is no checkpoint of this version"):
        Reader(tmp_path)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_all_processes_have_is_written_once(world_size: int) -> None:
    replicated = [Piece.whole(f"all-{i}", torch.ones(2)) for i in range(7)]
    written = [
        piece.name
        for rank in range(world_size)
        for piece in shared_out([*replicated, Piece(f"own-{rank}", (1,), 0, torch.ones(1))], rank, world_size)
    ]
    assert sorted(written) == sorted([f"all-{i}" for i in range(7)] + [f"own-{rank}" for rank in range(world_size)])


def test_shards_that_are_all_padding_are_not_written() -> None:
    assert shared_out([Piece("weight", (2,), 2, torch.empty(0))], 0, 1) == []


def test_copies_stay_what_they_were_and_their_memory_is_used_again() -> None:
    copies, tensor = HostCopies(), torch.ones(4)
    first = copies.copy([Piece.whole("weight", tensor)])
    tensor.fill_(2.0)
    assert first[0].data.tolist() == [1, 1, 1, 1]
    second = copies.copy([Piece.whole("weight", tensor)])
    assert second[0].data.tolist() == [2, 2, 2, 2]
    assert second[0].data.data_ptr() == first[0].data.data_ptr()
    # What has become shorter, as when layers freeze, gets a place of its own.
    assert copies.copy([Piece("weight", (4,), 0, tensor[:2])])[0].data.tolist() == [2, 2]
