"""The peers do the same work: the law of each view, its shape and its statistics."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.loader import Loader, LoaderConfig
from data.manifest import Manifest, SampleIndex
from data.reader import Reader, Sample
from data.recipes import dino_views, localmim_views, moco_views, simclr_views
from data.views import ViewSpec
from pipeline.benchmarks.peers.dali_reader import file_reader_batches, webdataset_reader_batches
from pipeline.benchmarks.peers.transforms import MEAN, STD, v1_pil, v2_pil, v2_tensor
from pipeline.benchmarks.peers.webdataset_torchvision import VARIANTS, webdataset_batches

CPU = torch.device("cpu")
# Nothing happens to a square image of this size.
IDENTITY = ViewSpec(32, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter_probability=0.0, grayscale=0.0)
TRANSFORMS = {"v1 on PIL": v1_pil, "v2 on PIL": v2_pil, "v2 on tensors": v2_tensor}


@pytest.fixture(params=TRANSFORMS)
def transformed(request: pytest.FixtureRequest) -> Any:
    """Return a function that applies a spec to the noise image and gives gray levels [3, 32, 32]."""

    def apply(spec: ViewSpec) -> Tensor:
        levels = noise()
        image = levels if request.param == "v2 on tensors" else Image.fromarray(levels.permute(1, 2, 0).numpy())
        view = TRANSFORMS[request.param](spec)(image)
        return (view * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255

    return apply


def noise() -> Tensor:
    return torch.randint(0, 256, (3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def close(view: Tensor, expected: Tensor, levels: float = 0.01) -> bool:
    return float((view - expected).abs().max()) <= levels


def test_a_view_without_changes_is_the_normalized_image(transformed: Any) -> None:
    assert close(transformed(IDENTITY), noise())


def test_flip(transformed: Any) -> None:
    assert close(transformed(replace(IDENTITY, flip=1.0)), noise().flip(2))


def test_solarize_inverts_from_128_on(transformed: Any) -> None:
    levels = noise()
    assert close(transformed(replace(IDENTITY, solarize=1.0)), torch.where(levels < 128, levels, 255 - levels))


def test_grayscale_is_luma_in_all_channels(transformed: Any) -> None:
    red, green, blue = noise().float()
    assert close(transformed(replace(IDENTITY, grayscale=1.0)), 0.299 * red + 0.587 * green + 0.114 * blue, levels=1.5)


def test_blur_of_a_known_sigma(transformed: Any) -> None:
    taps = torch.exp(-(torch.arange(-6, 7.0) ** 2) / 2)
    kernel = torch.outer(taps, taps).div(taps.sum() ** 2).expand(3, 1, 13, 13)
    expected = torch.nn.functional.conv2d(noise().float(), kernel, groups=3)
    view = transformed(replace(IDENTITY, blur=1.0, blur_sigma=(1.0, 1.0)))[:, 6:-6, 6:-6]
    # PIL's blur is a sum of boxes.
    assert float((view - expected).abs().mean()) < 2


def test_jitter_takes_the_spec_strengths(transformed: Any) -> None:
    still = replace(IDENTITY, jitter_probability=1.0, jitter=(0.0, 0.0, 0.0, 0.0))
    assert close(transformed(still), noise())
    bright = replace(still, jitter=(0.4, 0.0, 0.0, 0.0))
    means = torch.stack([transformed(bright).mean() for _ in range(100)]) / noise().float().mean()
    assert 0.55 < float(means.min()) < 0.75
    assert float(means.max()) > 1.1


def test_crop_takes_the_spec_scale_and_size(transformed: Any) -> None:
    spec = replace(IDENTITY, scale=(0.25, 0.25), size=16)
    view, levels = transformed(spec), noise()
    windows = levels.unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4)
    assert view.shape == (3, 16, 16)
    assert float((windows - view).abs().amax((2, 3, 4)).min()) < 0.01


@pytest.mark.parametrize("views", [moco_views, simclr_views, dino_views, localmim_views])
@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_of_each_methods_views(drawn_shards: Path, variant: str, views: Any) -> None:
    specs = views(32)
    stream = webdataset_batches(variant, tars(drawn_shards), specs, batch_size=6, workers=2)
    batch: Any = next(stream)
    stream.close()
    assert [tuple(view.shape) for view in batch] == [(6, 3, spec.size, spec.size) for spec in specs]
    assert all(view.dtype == torch.float32 for view in batch)


@pytest.mark.parametrize("variant", VARIANTS)
def test_statistics_are_those_of_our_views(drawn_shards: Path, variant: str) -> None:
    """Mean and standard deviation of 768 views differ by less than a tenth of ImageNet's standard deviation."""
    specs = moco_views(32)
    stream = webdataset_batches(variant, tars(drawn_shards), specs, batch_size=48, workers=1)
    theirs = [torch.cat(views) for views in zip(*islice(stream, 16), strict=True)]  # type: ignore[call-overload]
    stream.close()
    loader = Loader(LoaderConfig(str(drawn_shards), threads=1), specs, seed=0, batch_size=48, device=CPU)
    ours = [torch.cat(views) for views in zip(*(batch.views for batch in loader.batches(0, 768)), strict=True)]
    loader.close()
    for one, other in zip(theirs, ours, strict=True):
        assert one.shape == other.shape
        assert (one.mean((0, 2, 3)) - other.mean((0, 2, 3))).abs().max() < 0.1
        assert (one.std((0, 2, 3)) - other.std((0, 2, 3))).abs().max() < 0.1


def tars(shards: Path) -> tuple[Path, ...]:
    return tuple(shards / shard.name for shard in Manifest.load(shards).shards)


def test_dali_reads_the_same_images_by_its_own_readers(drawn_shards: Path, tmp_path: Path) -> None:
    reader = Reader(SampleIndex.load(drawn_shards, Manifest.load(drawn_shards)))
    files = []
    for sample in reader.read(range(48)):
        assert isinstance(sample, Sample)
        files.append(tmp_path / f"{sample.id}.jpg")
        files[-1].write_bytes(sample.image.tobytes())
    reader.close()
    options: Any = {"batch_size": 16, "threads": 1, "device": CPU}
    sums = []
    for stream in (webdataset_reader_batches(tars(drawn_shards), **options), file_reader_batches(files, **options)):
        images = [np.array(image) for (batch,) in islice(stream, 3) for image in batch]  # type: ignore[attr-defined]
        stream.close()
        assert len(images) == 48
        sums.append(sorted(int(image.sum()) for image in images))
    expected = sorted(int(np.asarray(Image.open(file).convert("RGB"), np.int64).sum()) for file in files)
    assert sums == [expected, expected]
