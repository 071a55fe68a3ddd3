"""Each method runs the forwards that its costs are counted from, and what a plan says reaches its backbones."""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pipeline.compression import Compression
from pipeline.compression.schedule import compression
from pipeline.methods import DINOConfig, MoCoConfig, SimCLRConfig, build_method
from pipeline.methods.base import Forward
from pipeline.models.vit import Known, ViT, ViTConfig
from pipeline.schedules import StepPlan

DINO_SIZES = {"out_dim": 24, "hidden_dim": 40, "bottleneck_dim": 16, "small_crops": 3, "small_size": 16}
SAMPLES, FROZEN = 4, 2


@dataclass(frozen=True)
class Crops:
    views: tuple[Tensor, ...]
    index: Tensor


@pytest.mark.parametrize(
    "config",
    [
        MoCoConfig(hidden_dim=64, out_dim=32),
        MoCoConfig(hidden_dim=64, out_dim=32, symmetric=True),
        SimCLRConfig(hidden_dim=64, out_dim=32),
        DINOConfig(**DINO_SIZES),  # type: ignore[arg-type]
        DINOConfig(**DINO_SIZES, symmetric=True),  # type: ignore[arg-type]
    ],
    ids=["moco", "moco-symmetric", "simclr", "dino", "dino-symmetric"],
)
def test_what_runs_is_what_is_listed(config: object, monkeypatch: pytest.MonkeyPatch) -> None:
    vit_config = ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 3, 3, stochastic_depth=0.1)
    method = build_method(config, ViT(vit_config, seed=0))
    # A key that no rule makes of this query.
    query, key = compression(16, 0.5), compression(4, 0.25)
    rates = (0.0,) * FROZEN + (1e-3,) * (4 - FROZEN)
    plan = StepPlan(0.5, 1e-3, 0.1, 0.99, rates, query, key, 1e-3, 0.07)
    ran: Counter[Forward] = Counter()
    forward = ViT.forward

    def watched(
        vit: ViT,
        images: Tensor,
        how: Compression,
        index: Tensor,
        stream: Tensor,
        frozen_layers: int = 0,
        stochastic: bool = False,
        known: Known | None = None,
    ) -> Tensor:
        learns = vit is method.encoder
        assert (frozen_layers, stochastic) == ((FROZEN, True) if learns else (0, False))
        assert torch.is_grad_enabled() == learns
        assert known is None
        ran[Forward(images.shape[-1], how, learns)] += len(images) // SAMPLES
        return forward(vit, images, how, index, stream, frozen_layers, stochastic)

    monkeypatch.setattr(ViT, "forward", watched)
    views = tuple(torch.randn(SAMPLES, 3, view.size, view.size) for view in method.views())
    method(Crops(views, torch.arange(SAMPLES)), plan)
    assert ran == Counter(method.forwards(plan))
