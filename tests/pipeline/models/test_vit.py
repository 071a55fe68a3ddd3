"""The backbone against timm's own forward, and the frozen prefix against autograd."""

import pytest
import torch

from pipeline.compression import Compression
from pipeline.compression.schedule import compression
from pipeline.models.patches import sincos_positions
from pipeline.models.vit import ViT, ViTConfig, _create

CONFIG = ViTConfig("vit_tiny_patch16_224", 48, 8, 48, 3, 3)
INDEX = torch.arange(4)


def graph_nodes(tensor: torch.Tensor) -> int:
    seen, stack = set(), [tensor.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [parent for parent, _ in node.next_functions]
    return len(seen)


@pytest.fixture
def vit() -> ViT:
    torch.manual_seed(0)
    return ViT(CONFIG, seed=0)


def test_uncompressed_forward_is_timms(vit: ViT) -> None:
    reference = _create(CONFIG)
    state = {f"blocks.{k}": v for k, v in vit.blocks.state_dict().items()}
    state |= {f"norm.{k}": v for k, v in vit.norm.state_dict().items()}
    state |= {f"patch_embed.proj.{k}": v for k, v in vit.patch.state_dict().items()}
    table = sincos_positions(6, 6, 48, torch.device("cpu"), torch.float32)
    state |= {"cls_token": vit.class_token, "pos_embed": torch.cat([torch.zeros(1, 48), table])[None]}
    reference.load_state_dict(state)
    images = torch.randn(4, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(vit(images, Compression(), INDEX), reference(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("patch_size", [8, 12, 16, 24])
@pytest.mark.parametrize("dropout", [0.0, 0.25, 0.5, 0.75, 0.9])
def test_every_cell_has_the_promised_tokens(vit: ViT, patch_size: int, dropout: float) -> None:
    cell = compression(patch_size, dropout)
    tokens = vit.embed(torch.randn(4, 3, 48, 48), cell, INDEX, stream=0)
    assert tokens.shape == (4, cell.sequence_length(48, 8), 48)


def test_dropping_before_projection_is_dropping_after(vit: ViT) -> None:
    images = torch.randn(4, 3, 48, 48)
    everything = vit.embed(images, Compression(), INDEX, stream=0)
    kept = vit.embed(images, compression(None, 0.75), INDEX, stream=0)
    assert kept.shape[1] == 10
    for sample in range(4):
        distance = torch.cdist(kept[sample], everything[sample], compute_mode="donot_use_mm_for_euclid_dist")
        assert float(distance.min(1).values.max()) < 1e-4


@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
def test_the_frozen_prefix_leaves_no_graph(vit: ViT, frozen: int) -> None:
    output = vit(torch.randn(4, 3, 48, 48), Compression(), INDEX, frozen_layers=frozen)
    whole = graph_nodes(vit(torch.randn(4, 3, 48, 48), Compression(), INDEX))
    if frozen:
        assert graph_nodes(output) <= whole * (3 - (frozen - 1)) / 3
    else:
        assert graph_nodes(output) == whole
    output.sum().backward()
    for layer, parameters in enumerate(vit.layers()):
        assert all((p.grad is None) == (layer < frozen) for p in parameters)


def test_freezing_does_not_change_the_forward(vit: ViT) -> None:
    images = torch.randn(4, 3, 48, 48)
    assert torch.equal(vit(images, Compression(), INDEX, frozen_layers=2), vit(images, Compression(), INDEX))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"name": "vit_nonsense"}, r"model\.name=vit_nonsense .* take a name from timm"),
        ({"name": "resnet18", "patch_size": 16, "image_size": 224}, r"model\.name=resnet18"),
        ({"num_heads": 5}, r"with \{'num_heads': 5\}: timm says .* num_heads that divides embed_dim"),
    ],
)
def test_a_backbone_that_cannot_be_is_refused(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ViT(ViTConfig(**({"name": "vit_tiny_patch16_224"} | arguments)), seed=0)  # type: ignore[arg-type]


def test_an_image_that_the_patch_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"patch_size must divide model\.image_size=225, got 16; try 224 pixels"):
        ViTConfig(image_size=225)
