"""The pipeline around the views: batches, buffers, errors, decoding alone, and what is defined for a GPU."""

import itertools
import os
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from data.dali import COLORS, Decoding, Encoded, ViewPipeline, build_graph, probe_hardware_share
from data.recipes import moco_views
from data.views import ViewSpec, center_view, draw

CPU = torch.device("cpu")
SPECS = [ViewSpec(48, blur=0.5, solarize=0.3), ViewSpec(32)]
Pictures = list[NDArray[np.uint8]]


def rows_for(pictures: Pictures, spec: ViewSpec) -> NDArray[np.float32]:
    """Draw boxes that fit in the smallest of the pictures."""
    ids, sides = np.arange(len(pictures)), np.full(len(pictures), 64)
    return draw(spec, seed=3, epoch=0 * ids, sample=ids, view=0, heights=sides, widths=sides)


def encoded(pictures: Pictures, specs: list[ViewSpec] = SPECS, tag: int = 0) -> Encoded:
    rows = tuple(rows_for(pictures, spec) for spec in specs)
    return Encoded(pictures, rows, np.full((len(pictures), 1), tag))


def batches(pictures: Pictures, sizes: list[int]) -> Iterator[Encoded]:
    everything = encoded(pictures)
    for first, last in itertools.pairwise(np.cumsum([0, *sizes])):
        cut = slice(first, last)
        rows = tuple(each[cut] for each in everything.rows)
        yield Encoded(pictures[cut], rows, np.arange(first, last)[:, None])


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize(("sizes", "threads"), [([3, 3, 1], 1), ([7], 3)])
def test_batches_views_and_threads_do_not_change_pixels(
    drawn_pictures: Pictures, sizes: list[int], threads: int, color: str
) -> None:
    def run(sizes: list[int], threads: int) -> list[torch.Tensor]:
        source = batches(drawn_pictures, sizes).__next__
        pipeline = ViewPipeline(SPECS, source, batch_size=max(sizes), device=CPU, threads=threads, color=color)
        parts = list(pipeline)
        assert torch.cat([tags for _, tags in parts]).flatten().tolist() == list(range(7))
        return [torch.cat([views[k] for views, _ in parts]) for k in range(2)]

    for ours, theirs in zip(run(sizes, threads), run([2, 5], 2), strict=True):
        assert torch.equal(ours, theirs)


def test_the_ways_of_changing_colors_differ(drawn_pictures: Pictures) -> None:
    def run(color: str) -> torch.Tensor:
        source = iter([encoded(drawn_pictures)]).__next__
        pipeline = ViewPipeline(SPECS, source, batch_size=7, device=CPU, threads=1, color=color)
        return next(pipeline)[0][0]

    assert not torch.equal(run("exact"), run("fused"))


def test_batches_stay_valid_after_the_next(drawn_pictures: Pictures) -> None:
    source = (encoded(drawn_pictures, SPECS[:1], tag=k) for k in range(6))
    pipeline = ViewPipeline(SPECS[:1], source.__next__, batch_size=7, device=CPU, threads=1)
    kept = [(views[0], views[0].clone(), tags) for views, tags in pipeline]
    assert [int(tags[0]) for _, _, tags in kept] == list(range(6))
    assert len({view.data_ptr() for view, _, _ in kept}) == 6
    assert all(torch.equal(view, copy) for view, copy, _ in kept)


def test_without_views_images_are_decoded_all_the_same(drawn_pictures: Pictures) -> None:
    source = (encoded(drawn_pictures, [], tag=k) for k in range(3))
    pipeline = ViewPipeline((), source.__next__, batch_size=7, device=CPU, threads=1)
    assert [(views, int(tags[6, 0])) for views, tags in pipeline] == [((), 0), ((), 1), ((), 2)]
    broken = [*drawn_pictures[:3], drawn_pictures[3][: len(drawn_pictures[3]) // 2]]
    pipeline = ViewPipeline((), iter([encoded(broken, [])]).__next__, batch_size=4, device=CPU, threads=1)
    with pytest.raises(RuntimeError, match="Failed to decode sample #3"):
        next(pipeline)


def test_an_error_of_the_source_reaches_the_caller() -> None:
    def source() -> Encoded:
        raise ValueError("no more disk")

    pipeline = ViewPipeline(SPECS, source, batch_size=2, device=CPU, threads=1)
    with pytest.raises(ValueError, match="no more disk"):
        next(pipeline)


def test_pipelines_come_and_go_without_a_trace(drawn_pictures: Pictures) -> None:
    """With batches in flight, or after a broken image: threads and file descriptors are given back at once."""
    broken = [*drawn_pictures[:6], np.zeros(10, np.uint8)]

    def come_and_go(pictures: Pictures) -> None:
        pipeline = ViewPipeline(SPECS, lambda: encoded(pictures), batch_size=7, device=CPU, threads=2, prefetch=3)
        try:
            next(pipeline)
        except RuntimeError:
            assert pictures is broken
        pipeline.close()

    def open_now() -> tuple[int, int]:
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    come_and_go(drawn_pictures)
    before = open_now()
    for _ in range(4):
        come_and_go(drawn_pictures)
        come_and_go(broken)
    # A thread that was joined may still be listed for a moment.
    deadline = time.monotonic() + 5
    while open_now() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert open_now() <= before


@pytest.mark.parametrize("color", COLORS)
def test_the_same_graph_can_be_defined_for_a_gpu(color: str) -> None:
    """Definition checks which inputs of an operator may live on the GPU; running it needs one."""
    specs = [*moco_views(48), center_view(48)]
    gpu = torch.device("cuda", 0)
    build_graph(specs, lambda: pytest.fail("not called"), 4, gpu, 2, 2, color, Decoding(0.3, (500, 400)))


def test_memory_is_reserved_for_the_largest_image_within_reason() -> None:
    assert Decoding(largest=(500, 400)).reserved() == (500, 400)
    assert Decoding().reserved() == (0, 0)
    height, width = Decoding(largest=(40_000, 10_000)).reserved()
    assert height * width <= 1 << 24
    assert height / width == pytest.approx(4, rel=0.01)


def test_the_probe_decodes_at_each_share_and_names_one(
    drawn_pictures: Pictures, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        share = probe_hardware_share(drawn_pictures, batch_size=4, device=CPU, threads=1, shares=(0.25, 0.5))
    assert share in (0.25, 0.5)
    assert "0.25: " in caplog.text
    assert f"decoding: {share:g} " in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_the_views_of_the_cpu(drawn_pictures: Pictures) -> None:
    def run(device: torch.device, color: str) -> torch.Tensor:
        source = iter([encoded(drawn_pictures)]).__next__
        pipeline = ViewPipeline(SPECS, source, batch_size=7, device=device, threads=2, color=color)
        return next(pipeline)[0][0].cpu()

    for color in COLORS:
        apart = (run(torch.device("cuda", 0), color) - run(CPU, color)).abs()
        assert apart.mean() < 0.03  # about 1.5 gray levels: chroma may be upsampled by other hardware
