"""Frozen layers that online and momentum encoder share are computed once, and nothing else changes."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from pipeline.compression import Compression
from pipeline.compression.schedule import compression
from pipeline.methods import DINOConfig, Method, MoCoConfig, build_method
from pipeline.models.momentum import MomentumEncoder
from pipeline.models.vit import ViT, ViTConfig
from pipeline.schedules import StepPlan

MakePlan = Callable[..., StepPlan]
CONFIGS = {
    "moco": MoCoConfig(hidden_dim=64, out_dim=32, symmetric=True),
    "moco-asymmetric": MoCoConfig(hidden_dim=64, out_dim=32, symmetric=False),
    "dino": DINOConfig(
        out_dim=24, hidden_dim=40, bottleneck_dim=16, small_crops=1, small_size=16, symmetric=True, last_layer_start=0.0
    ),
}


@dataclass(frozen=True)
class Crops:
    views: tuple[torch.Tensor, ...]
    index: torch.Tensor


def make_method(name: str, frozen: int) -> Method:
    """Return a method whose first layers froze long ago, and whose others have left the momentum encoder behind."""
    torch.manual_seed(0)
    vit = ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 3, 3, stochastic_depth=0.5)
    method = build_method(CONFIGS[name], ViT(vit, seed=0))
    with torch.no_grad():
        for parameter in method.encoder.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    for parameter in (p for layer in method.layers()[:frozen] for p in layer):
        parameter.requires_grad_(False)
    for _ in range(20):
        momentum_encoder(method).update(0.5)
    with torch.no_grad():
        for parameter in (p for p in method.parameters() if p.requires_grad):
            parameter.add_(0.01 * torch.randn_like(parameter))
    return method


def momentum_encoder(method: Method) -> MomentumEncoder:
    (found,) = next(value for value in vars(method).values() if isinstance(value, tuple) and len(value) == 1)
    assert isinstance(found, MomentumEncoder)
    return found


def make_crops(method: Method) -> Crops:
    generator = torch.Generator().manual_seed(3)
    views = tuple(torch.randn(8, 3, spec.size, spec.size, generator=generator) for spec in method.views())
    return Crops(views, torch.arange(8))


def calls(method: Method) -> list[int]:
    """Count from now on how often each block runs, in both networks."""
    count = [0] * 3
    networks = [method.encoder, method.representation if hasattr(method, "_teacher") else target(method)]
    for network in networks:
        for number, block in enumerate(network.blocks):
            block.attn.register_forward_hook(lambda *_, i=number: count.__setitem__(i, count[i] + 1))
    return count


def target(method: Method) -> ViT:
    return momentum_encoder(method).network["encoder"]  # type: ignore[index, return-value]


@pytest.mark.parametrize("frozen", [1, 3])
@pytest.mark.parametrize("name", ["moco", "dino"])
def test_sharing_changes_no_bit(make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch, name: str, frozen: int) -> None:
    method = make_method(name, frozen)
    plan, crops = make_plan(method, frozen=frozen), make_crops(method)
    count = calls(method)
    shared = method(crops, plan)
    # Small crops go through the student alone.
    small = 1 if name == "dino" else 0
    assert count == [1 + small if number < frozen else 2 + small for number in (1, 2, 3)]
    learning = [p for p in method.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(shared.loss, learning)
    monkeypatch.setattr(MomentumEncoder, "shared_layers", lambda *_: 0)
    alone = method(crops, plan)
    assert torch.equal(shared.loss, alone.loss)
    for one, other in zip(gradients, torch.autograd.grad(alone.loss, learning), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "query", "shared"),
    [
        ("moco", Compression(), 1),
        # Both sides have the larger patches.
        ("moco", compression(16, 0.0), 1),
        ("moco", compression(None, 0.5), 0),
        ("moco-asymmetric", Compression(), 0),
        ("dino", Compression(), 1),
        ("dino", compression(None, 0.5), 0),
    ],
)
def test_only_the_same_tokens_of_the_same_views_are_shared(
    make_plan: MakePlan, name: str, query: Compression, shared: int
) -> None:
    method = make_method(name, frozen=3)
    count = calls(method)
    method(make_crops(method), make_plan(method, query, frozen=3))
    small = 1 if name == "dino" else 0
    assert count == [2 - shared + small, 2 - shared + small, 2 + small]


def test_a_gap_that_is_open_is_not_shared(make_plan: MakePlan) -> None:
    method = make_method("moco", frozen=1)
    for parameter in (p for layer in method.layers()[:3] for p in layer):
        parameter.requires_grad_(False)
    count = calls(method)
    method(make_crops(method), make_plan(method, frozen=3))
    assert count == [2, 2, 2]
