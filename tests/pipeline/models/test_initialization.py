"""How weights start, against the bounds and deviations that the references state."""

import math
from pathlib import Path

import pytest
import timm
import torch

from pipeline.methods import DINOConfig, MoCoConfig, SimCLRConfig, build_method
from pipeline.models.initialization import initialize_as_dino, initialize_as_moco_v3
from pipeline.models.vit import Positions, ViT, ViTConfig

SIZES = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 2, "num_heads": 3}


@pytest.fixture
def vit() -> ViT:
    torch.manual_seed(0)
    return ViT(ViTConfig(**SIZES, positions=Positions.learned), seed=0)  # type: ignore[arg-type]


def test_moco_v3_counts_queries_keys_and_values_as_three_matrices(vit: ViT) -> None:
    initialize_as_moco_v3(vit)
    block = vit.blocks[0]
    for weight, fans in (
        (block.attn.qkv.weight, 96 + 96),
        (block.mlp.fc1.weight, 96 + 384),
        (vit.patch.weight, 192 + 96),
    ):
        bound = math.sqrt(6 / fans)
        assert float(weight.abs().max()) <= bound
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert float(block.attn.qkv.bias.abs().max()) == 0
    assert float(vit.class_token.abs().max()) < 1e-5


def test_dino_draws_everything_at_two_hundredths(vit: ViT) -> None:
    before = vit.patch.weight.clone()
    initialize_as_dino(vit)
    block = vit.blocks[1]
    for drawn in (block.attn.qkv.weight, block.mlp.fc2.weight, vit.positions):
        assert float(drawn.std()) == pytest.approx(0.02, rel=0.05)
    assert float(vit.class_token.std()) == pytest.approx(0.02, rel=0.25)
    assert float(block.mlp.fc1.bias.abs().max()) == 0
    # PyTorch's own for a convolution: uniform within 1 / sqrt(fan-in).
    assert not torch.equal(before, vit.patch.weight)
    assert float(vit.patch.weight.abs().max()) == pytest.approx(1 / math.sqrt(192), rel=0.01)


@pytest.mark.parametrize(
    "config",
    [
        MoCoConfig(hidden_dim=32, out_dim=16),
        SimCLRConfig(hidden_dim=32, out_dim=16),
        DINOConfig(out_dim=16, hidden_dim=32, bottleneck_dim=8, small_size=16),
    ],
    ids=["moco", "simclr", "dino"],
)
def test_loaded_weights_are_left_alone_and_reach_the_target(tmp_path: Path, config: object) -> None:
    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=96, depth=2, num_heads=3, num_classes=0
    )
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    vit_config = ViTConfig(**SIZES, positions=Positions.learned, weights=str(tmp_path / "vit.pth"))  # type: ignore[arg-type]
    method = build_method(config, ViT(vit_config, seed=0))
    for encoder in (method.encoder, method.representation):
        assert torch.equal(encoder.blocks[1].attn.qkv.weight, theirs.blocks[1].attn.qkv.weight)
        assert torch.equal(encoder.class_token, theirs.cls_token)
