"""LocalMIM against an independent fp64 reference, its masks, its taps under freezing, and what it costs."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from monitoring.metrics import TERMS, check
from pipeline.compression import Compression
from pipeline.compression.schedule import compression
from pipeline.methods import MoCoConfig, check_compressible
from pipeline.methods.localmim import MAX_TAPS, DecoderRates, LocalMIM, LocalMIMConfig, masked_error
from pipeline.models.decoders import PatchDecoder
from pipeline.models.hog import hog_targets
from pipeline.models.positions import sincos_positions
from pipeline.models.vit import ViT, ViTConfig
from pipeline.schedules import StepPlan

MakePlan = Callable[..., StepPlan]
SMALL = {"taps": [1, 2, 4], "doublings": [2, 1, -1], "decoder_dim": 32, "decoder_heads": 2, "mask": 0.6}


@dataclass(frozen=True)
class OneView:
    views: tuple[Tensor, ...]
    index: Tensor


def make_localmim(**changes: object) -> LocalMIM:
    torch.manual_seed(0)
    config = ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 4, 3, reference_length=17)
    return LocalMIM(LocalMIMConfig(**(SMALL | changes)), ViT(config, seed=0))  # type: ignore[arg-type]


def make_images(dtype: torch.dtype = torch.float64) -> OneView:
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return OneView((images,), torch.arange(40, 46))


def reference_loss(method: LocalMIM, batch: OneView) -> list[Tensor]:
    """Spell every step out, image by image: cut, mask, encode, put mask tokens between, decode, compare."""
    encoder, (images,) = method.encoder, batch.views
    kept = encoder.chosen(batch.index, method._masking(), 32)
    assert kept is not None
    errors: list[list[Tensor]] = [[] for _ in method.taps]
    weights: list[list[Tensor]] = [[] for _ in method.taps]
    for image, visible in zip(images, kept.tolist(), strict=True):
        patches = F.unfold(image[None], 8, stride=8)[0].T
        position = sincos_positions(4, 4, 48, image.device, image.dtype)
        x = patches @ encoder.patch.weight.flatten(1).T + encoder.patch.bias + position
        x = torch.cat([encoder.class_token[0], x[visible]])[None]
        hidden = {}
        for number, block in enumerate(encoder.blocks, start=1):
            x = block(x)
            hidden[number] = x
        mask = torch.tensor([float(i not in visible) for i in range(16)], dtype=image.dtype).reshape(1, 1, 4, 4)
        for tap, error, weight in zip(method.taps, errors, weights, strict=True):
            decoder = tap.decoder
            y = tap.norm(hidden[tap.block])[0] @ decoder.embed.weight.T + decoder.embed.bias
            rows = [y[1 + visible.index(i)] if i in visible else decoder.mask_token[0, 0] for i in range(16)]
            z = torch.stack(rows) + sincos_positions(4, 4, decoder.dim, image.device, image.dtype)
            z = decoder.norm(decoder.block(torch.cat([y[:1], z])[None]))[0, 1:]
            cells = decoder.predict(z.T.reshape(1, decoder.dim, 4, 4))
            target = hog_targets(image[None], (tap.cell,))[0][0].T.reshape(cells.shape)
            side = cells.shape[-1]
            scaled = F.interpolate(mask, (side, side), mode="nearest" if side > 4 else "area")
            error.append(((cells - target).square().mean(1, keepdim=True) * scaled).sum())
            weight.append(scaled.sum())
    return [torch.stack(e).sum() / torch.stack(w).sum() for e, w in zip(errors, weights, strict=True)]


def test_method_is_the_reference_in_fp64(make_plan: MakePlan) -> None:
    method, batch = make_localmim().double(), make_images()
    output = method(batch, make_plan(method))
    want = reference_loss(method, batch)
    for number, expected in enumerate(want, start=1):
        torch.testing.assert_close(output.metrics[f"loss_tap{number}"], expected.detach(), atol=1e-12, rtol=0)
    learning = [p for p in method.parameters() if p.requires_grad]
    got = torch.autograd.grad(output.loss, learning)
    for ours, expected in zip(got, torch.autograd.grad(torch.stack(want).sum(), learning), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=0)


def test_everything_learns(make_plan: MakePlan) -> None:
    method = make_localmim()
    method(make_images(torch.float32), make_plan(method)).loss.backward()
    assert [name for name, p in method.named_parameters() if p.grad is None] == []


def test_the_share_of_patches_is_visible_and_each_sample_has_its_own() -> None:
    method = LocalMIM(LocalMIMConfig(), ViT(ViTConfig("vit_tiny_patch16_224"), seed=0))
    visible = method.encoder.chosen(torch.arange(64), method._masking(), 224)
    assert visible is not None
    # int(196 * 0.25), as in the reference.
    assert visible.shape == (64, 49)
    assert len({tuple(row) for row in visible.tolist()}) == 64
    again = method.encoder.chosen(torch.tensor([5]), method._masking(), 224)
    assert again is not None
    assert again.tolist() == visible[5:6].tolist()


def test_the_sizes_of_the_paper() -> None:
    method = LocalMIM(LocalMIMConfig(), ViT(ViTConfig("vit_tiny_patch16_224"), seed=0))
    assert [tap.cell for tap in method.taps] == [4, 8, 16, 32]
    tokens, visible = torch.zeros(1, 50, 192), torch.arange(49)[None]
    shapes = [tuple(tap.decoder(tokens, visible, 14).shape) for tap in method.taps]
    assert shapes == [(1, 3136, 27), (1, 784, 27), (1, 196, 27), (1, 49, 27)]


def test_a_cell_counts_by_its_masked_share() -> None:
    # Two by two patches, of which the upper ones are masked.
    masked = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    target = torch.zeros(1, 16, 3)
    predicted = torch.arange(16.0)[None, :, None].expand(1, 16, 3)
    # Cells of half a patch: the upper eight.
    expected = sum(i**2 for i in range(8)) / 8
    torch.testing.assert_close(masked_error(predicted, target, masked, 2), torch.tensor(expected))
    # One cell of all four patches, half masked: its error, whatever its weight.
    torch.testing.assert_close(masked_error(predicted[:, 5:6], target[:, :1], masked, 2), torch.tensor(25.0))


@pytest.mark.parametrize(("frozen", "left"), [(0, [1, 2, 3]), (1, [1, 2, 3]), (2, [2, 3]), (3, [3]), (4, [3])])
def test_a_tap_goes_with_its_block(make_plan: MakePlan, frozen: int, left: list[int]) -> None:
    method, batch = make_localmim(), make_images(torch.float32)
    whole = method(batch, make_plan(method)).metrics
    plan = make_plan(method, frozen=frozen)
    output = method(batch, plan)
    assert [name for name in output.metrics if name.startswith("loss_")] == [f"loss_tap{tap}" for tap in left]
    for tap in left:
        torch.testing.assert_close(output.metrics[f"loss_tap{tap}"], whole[f"loss_tap{tap}"])
    output.loss.backward()
    learns = {name for name, p in method.named_parameters() if p.grad is not None}
    layers = method.layers()
    names = {p: name for name, p in method.named_parameters()}
    # Nothing upstream of the boundary, decoders of frozen blocks included, has a gradient.
    assert not learns & {names[p] for layer in layers[:frozen] for p in layer}


def test_decoders_follow_their_block_or_the_global_rate() -> None:
    tapped, heads = make_localmim(), make_localmim(decoder_rates=DecoderRates.shared)
    for method, count in ((tapped, 2), (heads, 0)):
        own = {id(p) for layer in method.layers() for p in layer}
        inside = [all(id(p) in own for p in tap.decoder.parameters()) for tap in method.taps]
        assert inside == [count > 0] * 3
        assert sum(len(layer) for layer in method.layers()) == len(own)


def test_cost_counts_decoders_and_loses_them_with_their_blocks(make_plan: MakePlan) -> None:
    method = LocalMIM(LocalMIMConfig(), ViT(ViTConfig("vit_base_patch16_224"), seed=0))
    plan = make_plan(method)
    # Multiplications of the decoders, 10^9, by hand, less those of attention without weights, which nothing counts.
    decoders = (method.sample_cost(plan) / 3 - 50 / 197) * 197 * 12 * 7.077888e-3
    assert decoders == pytest.approx(0.241 + 0.213 + 0.186 + 0.185 - 4 * 2 * 197**2 * 256e-9, rel=0.005)
    frozen = make_plan(method, frozen=3)
    assert method.sample_cost(frozen) < method.sample_cost(plan) - 0.03
    assert method.nominal_sample_cost(frozen) == method.nominal_sample_cost(plan)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mask": 0.0}, r"method\.mask must be a share of the patches in \(0, 1\), got 0; 0\.75"),
        ({"taps": [1, 4]}, r"method\.taps and method\.doublings must be of one length of at most 6"),
        ({"taps": [1, 2, 3, 4, 5, 6, 7], "doublings": [6, 5, 4, 3, 2, 1, 0]}, r"of one length of at most 6"),
        ({"taps": [2, 1, 4]}, r"method\.taps must be rising"),
        ({"doublings": [0, 1, 2]}, r"method\.doublings must fall"),
        ({"taps": [1, 2, 3]}, r"method\.taps must end with the last of 4 blocks"),
        ({"doublings": [4, 1, 0]}, r"model\.patch_size must be a multiple of 16, for .* got 8; take another"),
        ({"doublings": [1, 0, -3]}, r"model\.image_size must be a multiple of 8 patches, for .* got 4 patches"),
        ({"decoder_dim": 30}, r"method\.decoder_dim must be a multiple of 4, of method\.decoder_heads=2 and of 2 to"),
        ({"decoder_dim": 32, "decoder_heads": 6}, r"of method\.decoder_heads=6 and .* got 32"),
        ({"decoder_dim": 4, "doublings": [3, 1, 0]}, r"largest of method\.doublings=\[3, 1, 0\], got 4"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_localmim(**changes)


@pytest.mark.parametrize("query", [compression(16, 0.0), compression(None, 0.5)])
def test_compression_is_refused_with_the_reason(make_plan: MakePlan, query: Compression) -> None:
    method = make_localmim()
    with pytest.raises(ValueError, match=r"method=localmim takes no compression: its mask already is"):
        method.tokens(make_plan(method, query))


def test_the_models_own_patches_are_no_compression(make_plan: MakePlan) -> None:
    method = make_localmim()
    assert method.tokens(make_plan(method, compression(8, 0.0))) == method.tokens(make_plan(method)) == 7


def test_commands_that_compress_can_ask_beforehand() -> None:
    check_compressible(MoCoConfig())
    with pytest.raises(ValueError, match="method=localmim takes no compression"):
        check_compressible(LocalMIMConfig())


def test_one_patch_leaves_nothing_to_mask() -> None:
    vit = ViT(ViTConfig("vit_tiny_patch16_224", 8, 8, 48, 4, 3), seed=0)
    with pytest.raises(ValueError, match=r"model\.image_size must be several patches of 8 for a mask, got 8"):
        LocalMIM(LocalMIMConfig(taps=[4], doublings=[0]), vit)


def test_every_tap_has_its_name_in_the_catalogue() -> None:
    check({f"{TERMS}{number}": 0.0 for number in range(1, MAX_TAPS + 1)})
    assert [tap.name for tap in make_localmim().taps] == [f"{TERMS}{number}" for number in (1, 2, 3)]


def test_a_head_costs_less_where_cells_are_larger() -> None:
    # One multiplication by the last layer's weights for each of 16, 4 and 1 cells; all else is the same.
    costs = [PatchDecoder(8, 8, 2, doublings, 5).weights_per_image(3, 4) for doublings in (0, -1, -2)]
    assert (costs[0] - costs[1], costs[1] - costs[2]) == (12 * 8 * 5, 3 * 8 * 5)
