"""Views that go through the backbone together are as if they had gone alone."""

from dataclasses import dataclass

import pytest
import torch

from pipeline.compression import Compression
from pipeline.compression.schedule import compression
from pipeline.methods.multicrop import encode
from pipeline.models.vit import ViT, ViTConfig


@dataclass(frozen=True)
class Crops:
    views: tuple[torch.Tensor, ...]
    index: torch.Tensor


@pytest.fixture
def vit() -> ViT:
    torch.manual_seed(0)
    return ViT(ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 3, 3), seed=0).double()


@pytest.fixture
def crops() -> Crops:
    generator = torch.Generator().manual_seed(1)
    sizes = (32, 32, 16, 16, 16)
    views = tuple(torch.randn(4, 3, s, s, dtype=torch.float64, generator=generator) for s in sizes)
    return Crops(views, torch.arange(10, 14))


@pytest.mark.parametrize("large", [compression(None, 0.5), compression(16, 0.0), compression(16, 0.5)])
def test_grouped_features_are_those_of_single_crops(vit: ViT, crops: Crops, large: Compression) -> None:
    asked = {0: large, 1: large, **dict.fromkeys((2, 3, 4), Compression())}
    together = encode(vit, crops, asked)
    assert list(together) == [0, 1, 2, 3, 4]
    for view, how in asked.items():
        alone = vit(crops.views[view], how, crops.index, view)
        torch.testing.assert_close(together[view], alone, atol=1e-12, rtol=0)


def test_one_call_for_each_shape(vit: ViT, crops: Crops, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    forward = vit.forward

    def counted(images: torch.Tensor, *rest: object) -> torch.Tensor:
        rows.append((len(images), images.shape[-1]))
        return forward(images, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(vit, "forward", counted)
    both = {0: compression(None, 0.5), 1: compression(None, 0.5), 2: Compression(), 4: Compression()}
    encode(vit, crops, both)
    assert rows == [(8, 32), (8, 16)]
    rows.clear()
    encode(vit, crops, {0: compression(16, 0.5), 1: compression(16, 0.0)})
    assert rows == [(4, 32), (4, 32)]
