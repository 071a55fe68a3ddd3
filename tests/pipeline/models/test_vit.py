"""The backbone against timm's own forward, and the frozen prefix against autograd."""

import copy
from dataclasses import replace

import pytest
import torch

from pipeline.compression import Compression
from pipeline.compression.schedule import compression
from pipeline.models.positions import sincos_positions
from pipeline.models.stateless_random import residual_scales
from pipeline.models.timm_backbone import create
from pipeline.models.vit import Positions, ViT, ViTConfig

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


@pytest.fixture
def learned() -> ViT:
    torch.manual_seed(0)
    return ViT(replace(CONFIG, positions=Positions.learned), seed=0)


def test_uncompressed_forward_is_timms(vit: ViT) -> None:
    reference = create(CONFIG)
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


@pytest.mark.parametrize("positions", Positions)
@pytest.mark.parametrize("cell", [Compression(), compression(16, 0.0), compression(4, 0.5), compression(None, 0.75)])
def test_views_of_other_sizes_are_encoded(positions: Positions, cell: Compression) -> None:
    vit = ViT(replace(CONFIG, positions=positions), seed=0)
    for size in (16, 32, 48, 64):
        tokens = vit.embed(torch.randn(4, 3, size, size), cell, INDEX, stream=0)
        assert tokens.shape == (4, cell.sequence_length(size, 8), 48)


def test_positions_of_a_small_view_lie_on_the_grid_of_the_config(vit: ViT) -> None:
    embedded = vit.embed(torch.zeros(1, 3, 24, 24), Compression(), INDEX[:1], stream=0)[0, 1:]
    table = sincos_positions(3, 6, 48, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(embedded, table + vit.patch.bias)


def test_chosen_tokens_keep_their_learned_positions(learned: ViT) -> None:
    images = torch.randn(4, 3, 48, 48)
    for patch_size in (8, 16):
        everything = learned.embed(images, compression(patch_size, 0.0), INDEX, stream=0)
        kept = learned.embed(images, compression(patch_size, 0.5), INDEX, stream=0)
        for sample in range(4):
            distance = torch.cdist(kept[sample], everything[sample], compute_mode="donot_use_mm_for_euclid_dist")
            assert float(distance.min(1).values.max()) < 1e-5


def test_only_chosen_tokens_send_a_gradient_to_learned_positions(learned: ViT) -> None:
    # Of one number: the sum of all that a norm returns is a constant.
    learned(torch.randn(1, 3, 48, 48), compression(None, 0.75), INDEX[:1])[..., 0].sum().backward()
    gradient = learned.positions.grad
    assert gradient is not None
    assert int((gradient.abs().sum(1) > 0).sum()) == 1 + 9


def test_learned_positions_freeze_with_the_embedding(learned: ViT) -> None:
    assert any(p is learned.positions for p in learned.layers()[0])
    assert sum(p.numel() for layer in learned.layers() for p in layer) == sum(
        p.numel() for name, p in learned.named_parameters() if not name.startswith("norm.")
    )
    learned(torch.randn(4, 3, 48, 48), compression(16, 0.0), INDEX, frozen_layers=1).sum().backward()
    assert learned.positions.grad is None


def test_a_patch_that_does_not_divide_a_view_is_refused(vit: ViT) -> None:
    with pytest.raises(ValueError, match=r"=32, got 12; sizes that do: 8, 16, 32"):
        vit(torch.zeros(4, 3, 32, 32), compression(12, 0.0), INDEX)


def test_another_seed_drops_other_tokens(vit: ViT) -> None:
    images = torch.randn(4, 3, 48, 48)
    one = vit.embed(images, compression(None, 0.5), INDEX, stream=0)
    vit.seed = 1
    assert not torch.equal(vit.embed(images, compression(None, 0.5), INDEX, stream=0), one)


def test_attention_is_fused(vit: ViT) -> None:
    assert all(block.attn.fused_attn for block in vit.blocks)


def test_views_that_come_together_are_encoded_as_if_alone() -> None:
    vit = ViT(replace(CONFIG, stochastic_depth=0.5), seed=0)
    images, cell = torch.randn(8, 3, 48, 48), compression(None, 0.5)
    alone = [vit(images[4 * s : 4 * s + 4], cell, INDEX, s, stochastic=True) for s in (0, 1)]
    together = vit(images, cell, INDEX.repeat(2), torch.tensor([0] * 4 + [1] * 4), stochastic=True)
    # The same choices; products of matrices of other heights may round otherwise.
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


# DeiT-3 scales branches, too.
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit3_small_patch16_224"])
def test_stochastic_depth_is_timms_blocks_with_our_factors(name: str) -> None:
    torch.manual_seed(0)
    vit = ViT(replace(CONFIG, name=name, stochastic_depth=0.6), seed=3)
    for parameter in vit.blocks.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    images = torch.randn(4, 3, 48, 48)
    scales = residual_scales(INDEX, 0.6, 3, seed=3, stream=1)
    assert 0 < int((scales == 0).sum()) < scales.numel()

    class Factor(torch.nn.Module):
        def __init__(self, scale: torch.Tensor) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, branch: torch.Tensor) -> torch.Tensor:
            return branch * self.scale[:, None, None]

    reference = copy.deepcopy(vit)
    for block, (attention, mlp) in zip(reference.blocks, scales, strict=True):
        block.drop_path1, block.drop_path2 = Factor(attention), Factor(mlp)
    ours = vit(images, Compression(), INDEX, 1, stochastic=True)
    torch.testing.assert_close(ours, reference(images, Compression(), INDEX, 1), atol=1e-6, rtol=0)


def test_stochastic_depth_is_off_unless_asked_for_even_in_training_mode() -> None:
    vit = ViT(replace(CONFIG, stochastic_depth=0.9), seed=0).train()
    plain = ViT(CONFIG, seed=0)
    plain.load_state_dict(vit.state_dict())
    images = torch.randn(4, 3, 48, 48)
    assert torch.equal(vit(images, Compression(), INDEX), plain(images, Compression(), INDEX))
    assert not torch.equal(vit(images, Compression(), INDEX, stochastic=True), plain(images, Compression(), INDEX))
    assert torch.equal(
        vit.eval()(images, Compression(), INDEX, stochastic=True),
        vit.train()(images, Compression(), INDEX, stochastic=True),
    )
