"""The data plane on a GPU: the CPU's pixels, the same ones twice, no harm from broken images. Else skipped."""

import io
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from data.dali import COLORS, STD, Encoded, ViewPipeline, probe_hardware_share
from data.defects import find_undecodable
from data.loader import Loader, LoaderConfig
from data.manifest import Manifest, SampleIndex
from data.recipes import dino_views, moco_views
from data.views import draw

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SIZES = [(375, 500), (500, 333), (300, 300), (213, 640)] * 16


def picture(seed: int) -> NDArray[np.uint8]:
    height, width = SIZES[seed]
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8))
    full, encoded = coarse.resize((width, height), Image.Resampling.BICUBIC), io.BytesIO()
    full.save(encoded, "JPEG", quality=90, subsampling=["4:4:4", "4:2:0"][seed % 2])
    return np.frombuffer(encoded.getvalue(), np.uint8)


@pytest.fixture(scope="module")
def images() -> list[NDArray[np.uint8]]:
    return [picture(k) for k in range(len(SIZES))]


def views(images: list[NDArray[np.uint8]], device: torch.device, color: str) -> list[torch.Tensor]:
    specs, ids = [*moco_views(224), dino_views(224)[2]], np.arange(len(images))
    heights, widths = np.array(SIZES).T
    rows = tuple(
        draw(spec, seed=1, epoch=0 * ids, sample=ids, view=k, heights=heights, widths=widths)
        for k, spec in enumerate(specs)
    )
    source = iter([Encoded(images, rows, ids[:, None])]).__next__
    pipeline = ViewPipeline(specs, source, batch_size=len(images), device=device, threads=4, color=color)
    made, _ = next(pipeline)
    return [view.cpu() for view in made]


@pytest.mark.parametrize("color", COLORS)
def test_the_gpu_makes_the_cpus_pixels(images: list[NDArray[np.uint8]], color: str) -> None:
    """Within two gray levels in the mean: decoders and filters round in their own ways."""
    gray_levels = torch.tensor(STD)[:, None, None]
    for ours, theirs in zip(views(images, GPU, color), views(images, CPU, color), strict=True):
        assert float(((ours - theirs).abs() * gray_levels).mean()) < 2.0


@pytest.mark.parametrize("color", COLORS)
def test_the_same_parameters_make_the_same_pixels_twice(images: list[NDArray[np.uint8]], color: str) -> None:
    for first, second in zip(views(images, GPU, color), views(images, GPU, color), strict=True):
        assert torch.equal(first, second)


def test_batches_stay_valid_while_later_ones_are_made(drawn_shards: Path) -> None:
    loader = Loader(LoaderConfig(str(drawn_shards)), moco_views(64), seed=0, batch_size=16, device=GPU)
    kept = [(batch, batch.views[0].clone()) for batch in islice(loader.batches(), 12)]
    torch.cuda.synchronize()
    assert all(torch.equal(batch.views[0], copy) for batch, copy in kept)
    loader.close()


def test_broken_images_are_found_and_replaced(
    images: list[NDArray[np.uint8]], drawn_shards: Path, tmp_path: Path
) -> None:
    damaged = [image[:4000] if k in (3, 17) else image for k, image in enumerate(images)]
    assert list(find_undecodable(damaged, GPU)) == [3, 17]
    copy = Path(shutil.copytree(drawn_shards, tmp_path / "damaged"))
    index = SampleIndex.load(copy, Manifest.load(copy))
    with index.paths[0].open("r+b") as tar:
        tar.seek(int(index.offset[3]))
        tar.write(b"<html>")
    loader = Loader(LoaderConfig(str(copy)), moco_views(32), seed=0, batch_size=16, device=GPU)
    assert sum(len(batch.index) for batch in loader.batches(stop=48)) == 48
    assert loader.bad_samples == 1
    loader.close()


def test_a_share_for_the_engine_is_found(images: list[NDArray[np.uint8]]) -> None:
    share = probe_hardware_share(images, batch_size=64, device=GPU, threads=4, largest=(500, 640))
    assert 0 <= share <= 1
