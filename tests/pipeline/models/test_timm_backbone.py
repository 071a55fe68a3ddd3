"""Families of timm by name: equal to timm's own forward, weights of a file, and what is refused."""

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer

from data.dali.view import MEAN, STD
from pipeline.compression import Compression
from pipeline.compression.schedule import compression
from pipeline.models.timm_backbone import find_misfit, fold_normalization
from pipeline.models.vit import Positions, ViT, ViTConfig

LEARNED = ViTConfig("vit_tiny_patch16_224", 48, 8, 48, 3, 3, Positions.learned)
SIZES = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
INDEX = torch.arange(4)
# Plain, DeiT-3 (LayerScale, no position of the class token), CLIP (a norm before the blocks, no bias of patches),
# DINOv2 (LayerScale), parallel blocks with RMS norm.
FAMILIES = [
    "vit_small_patch16_224",
    "deit3_small_patch16_224",
    "vit_base_patch16_clip_224",
    "vit_base_patch32_clip_quickgelu_224",
    "vit_small_patch14_dinov2",
    "vit_base_patch16_xp_224",
]


def make_reference(name: str, **changes: Any) -> VisionTransformer:
    """Return a small timm model in which nothing is zero, one or a copy by accident of its initialization."""
    torch.manual_seed(1)
    model = timm.create_model(name, **(SIZES | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def pooled(model: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    return model.pool(model.forward_features(images))


def write(model: VisionTransformer, path: Path) -> str:
    return save(model.state_dict(), path)


def save(state: dict[str, torch.Tensor], path: Path) -> str:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state}, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_of_timms_is_loaded_and_encoded_as_timm_does(name: str, suffix: str, tmp_path: Path) -> None:
    reference = make_reference(name)
    weights = write(reference, tmp_path / f"weights{suffix}")
    vit = ViT(replace(LEARNED, name=name, weights=weights), seed=0)
    images = torch.randn(4, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(
            vit(images, Compression(), INDEX), pooled(reference, images), atol=1e-5, rtol=0, check_stride=False
        )


def test_a_file_of_another_size_is_resized_as_timm_does(tmp_path: Path) -> None:
    large = make_reference("vit_small_patch16_224", img_size=112, patch_size=16)
    weights = write(large, tmp_path / "large.safetensors")
    vit = ViT(replace(LEARNED, name="vit_small_patch16_224", weights=weights), seed=0)
    large.set_input_size(48, 8)
    images = torch.randn(4, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(vit(images, Compression(), INDEX), pooled(large, images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("cell", [compression(None, 0.75), compression(12, 0.5)])
def test_a_norm_before_the_blocks_is_applied_to_what_is_kept(cell: Compression) -> None:
    vit = ViT(replace(LEARNED, name="vit_base_patch16_clip_224"), seed=0)
    tokens = vit.embed(torch.randn(4, 3, 48, 48), cell, INDEX, 0)
    torch.testing.assert_close(tokens.mean(2), torch.zeros(tokens.shape[:2]), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.var(2, correction=0), torch.ones(tokens.shape[:2]), atol=0.1, rtol=0)
    assert all(any(p is q for q in vit.layers()[0]) for p in vit.norm_pre.parameters())


@pytest.mark.parametrize(
    ("name", "patch_size", "width", "depth", "positions"),
    [
        ("vit_tiny_patch16_224", 16, 192, 12, 197),
        ("vit_small_patch16_224", 16, 384, 12, 197),
        ("vit_base_patch16_224", 16, 768, 12, 197),
        ("vit_large_patch16_224", 16, 1024, 24, 197),
        ("vit_huge_patch14_224", 14, 1280, 32, 257),
        ("deit3_large_patch16_224", 16, 1024, 24, 196),
        ("vit_huge_patch14_clip_224", 14, 1280, 32, 257),
    ],
)
@pytest.mark.parametrize("kind", Positions)
def test_published_sizes_are_built_by_name(
    kind: Positions, name: str, patch_size: int, width: int, depth: int, positions: int
) -> None:
    with torch.device("meta"), torch.no_grad():
        vit = ViT(ViTConfig(name, 224, patch_size, positions=kind), seed=0)
        features = vit(torch.empty(2, 3, 224, 224), compression(None, 0.5), torch.arange(2))
    assert features.shape == (2, width)
    assert vit.num_layers == 1 + depth
    assert len(vit.positions) == (positions if kind is Positions.learned else 0)


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({}, ""),
        ({"reg_tokens": 4}, "has registers"),
        ({"class_token": False, "global_pool": "avg"}, "has no class token"),
        ({"pos_embed": "none"}, "has no absolute positions"),
        ({"patch_size": (8, 16)}, "has patches of 8 x 16 pixels, which are not square"),
        ({"embed_norm_layer": torch.nn.LayerNorm}, "has a patch embedding that is not one convolution"),
    ],
)
def test_a_model_with_parts_that_have_no_place_is_found_out(changes: dict[str, Any], finding: str) -> None:
    sizes = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
    assert find_misfit(VisionTransformer(**(sizes | changes))) == finding


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"name": "vit_nonsense"}, r"model\.name=vit_nonsense .* take a name from timm"),
        ({"name": "resnet18"}, r"model\.name=resnet18"),
        ({"num_heads": 5}, r"with \{.*'num_heads': 5\}: timm says .* num_heads that divides embed_dim"),
        ({"name": "vit_base_patch14_reg4_dinov2"}, r"has registers; take a plain ViT"),
        ({"name": "deit_tiny_distilled_patch16_224"}, r"is timm's VisionTransformerDistilled, not its VisionTransf"),
        ({"name": "vit_small_patch16_rope_224"}, r"is timm's Eva, not its VisionTransformer"),
        ({"name": "vit_base_patch16_siglip_224"}, r"timm says Token pooling needs the class token;"),
        (
            {"name": "vit_base_patch16_xp_224", "stochastic_depth": 0.1},
            r"has blocks that model\.stochastic_depth=0\.1 knows no branches of",
        ),
        ({"embed_dim": 54, "positions": Positions.sincos}, r"divisible by 4, got 54; say model\.positions=learned"),
        ({"stochastic_depth": 1.0}, r"model\.stochastic_depth must be a rate in \[0, 1\), got 1;"),
        ({"weights": "no.pth"}, r"model\.weights=no\.pth is no file; give"),
        ({"weights": "timm", "positions": Positions.sincos}, r"model\.weights=timm .*; say model\.positions=learned"),
        (
            {"weights": "timm"},
            r"model\.weights=timm are those of the named model, .*, got .*'depth': 3.*; leave the sizes",
        ),
    ],
)
def test_a_backbone_that_cannot_be_is_refused(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ViT(replace(LEARNED, **arguments), seed=0)


@pytest.mark.parametrize("content", ["another model", "no weights at all"])
def test_a_file_that_does_not_fit_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    if content == "another model":
        write(make_reference("deit3_small_patch16_224"), path)
    else:
        path.write_text(content)
    with pytest.raises(
        ValueError, match=r"timm says .*; take model\.weights=.*weights\.pth out, or weights of this very"
    ):
        ViT(replace(LEARNED, weights=str(path)), seed=0)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("depth", "prefix", "sentence"),
    [
        (3, "net.", r"lacks 42 keys \(cls_token, pos_embed, .*, \.\.\.\) and has 44 keys \(net\..*\) too many; take"),
        (2, "", r"lacks 12 keys \(blocks\.2\.[^,]*, blocks\.2\.[^,]*, blocks\.2\.[^,]*, \.\.\.\); take model\.w"),
        (4, "", r"has 12 keys \(blocks\.3\.[^,]*, .*, \.\.\.\) too many; take model\.weights=.* out, or wei"),
    ],
)  # fmt: skip
def test_a_file_is_loaded_as_a_whole_or_refused(
    depth: int, prefix: str, sentence: str, suffix: str, tmp_path: Path
) -> None:
    state = make_reference("vit_small_patch16_224", depth=depth).state_dict()
    path = tmp_path / f"weights{suffix}"
    save({prefix + key: value for key, value in state.items()}, path)
    with pytest.raises(
        ValueError, match=rf"^model\.weights={path} does not fit model\.name=.*: it {sentence}"
    ) as refusal:
        ViT(replace(LEARNED, weights=str(path)), seed=0)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model": {"a": torch.zeros(3)}}])
def test_a_file_without_weights_is_refused(content: dict[str, Any], tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"lacks 42 keys"):
        ViT(replace(LEARNED, weights=str(tmp_path / "weights.pth")), seed=0)


def test_a_file_of_another_width_is_refused(tmp_path: Path) -> None:
    weights = write(make_reference("vit_small_patch16_224", embed_dim=96), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"it has \d+ keys \(cls_token, .*\) of another shape; take"):
        ViT(replace(LEARNED, weights=weights), seed=0)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_what_wrappers_put_before_keys_is_taken_off(prefix: str, tmp_path: Path) -> None:
    reference = make_reference("vit_small_patch16_224")
    state = {prefix + key: value for key, value in reference.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "weights.pth")
    vit = ViT(replace(LEARNED, weights=str(tmp_path / "weights.pth")), seed=0)
    assert torch.equal(vit.patch.weight, reference.patch_embed.proj.weight)
    assert torch.equal(vit.blocks[2].mlp.fc2.weight, reference.blocks[2].mlp.fc2.weight)


def test_a_classifier_is_no_part_of_a_backbone(tmp_path: Path) -> None:
    state = make_reference("vit_small_patch16_224").state_dict()
    extra = {"head_dist.weight": torch.zeros(3, 48), "fc_norm.weight": torch.ones(48)}
    without = {key: value for key, value in state.items() if not key.startswith("head")}
    for content in (state, without, state | extra):
        torch.save(content, tmp_path / "weights.pth")
        ViT(replace(LEARNED, weights=str(tmp_path / "weights.pth")), seed=0)


def test_layer_scales_of_deit_3s_authors_are_known_by_their_names(tmp_path: Path) -> None:
    reference = make_reference("deit3_small_patch16_224")
    state = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", key): value for key, value in reference.state_dict().items()}
    torch.save({"model": state}, tmp_path / "weights.pth")
    vit = ViT(replace(LEARNED, name="deit3_small_patch16_224", weights=str(tmp_path / "weights.pth")), seed=0)
    assert torch.equal(vit.blocks[0].ls1.gamma, reference.blocks[0].ls1.gamma)


def test_an_image_that_the_patch_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"patch_size must divide model\.image_size=225, got 16; try 224 pixels"):
        ViTConfig(image_size=225)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("vit_base_patch32_224", 32),
        ("vit_huge_patch14_clip_224", 14),
        ("vit_base_patch16_224.mae", 16),
        ("test_vit", 16),
    ],
)
def test_patches_are_those_of_the_name_unless_told_otherwise(name: str, size: int) -> None:
    assert ViTConfig(name).patch_size == size
    assert ViTConfig(name, patch_size=8).patch_size == 8


@pytest.mark.parametrize("bias", [True, False])
def test_a_kernel_for_other_pixels_sees_the_same_in_ours(bias: bool) -> None:
    torch.manual_seed(0)
    patch = torch.nn.Conv2d(3, 8, 4, 4, bias=bias).double()
    pixels = torch.rand(2, 3, 8, 8, dtype=torch.float64) * 255

    def normalized(mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
        scale, shift = (255 * torch.tensor(each, dtype=torch.float64)[:, None, None] for each in (std, mean))
        return (pixels - shift) / scale

    theirs = (0.5, 0.4, 0.3), (0.5, 0.25, 0.2)
    want = patch(normalized(*theirs))
    fold_normalization(patch, *theirs)
    ours = tuple(value / 255 for value in MEAN), tuple(value / 255 for value in STD)
    torch.testing.assert_close(patch(normalized(*ours)), want, atol=1e-9, rtol=0)


def test_a_kernel_for_our_pixels_stays_as_it_is() -> None:
    patch = torch.nn.Conv2d(3, 8, 4, 4, bias=False)
    before = patch.weight.clone()
    fold_normalization(patch, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert torch.equal(patch.weight, before)
    assert patch.bias is None


def test_timms_own_weights_see_our_pixels_as_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "vit_base_patch16_clip_224"
    reference = make_reference(name)
    # What timm would download.
    monkeypatch.setattr("pipeline.models.timm_backbone.timm.create_model", lambda *_, **__: copy.deepcopy(reference))
    config = ViTConfig(name, 48, 8, positions=Positions.learned, weights="timm")
    vit = ViT(config, seed=0)
    mean, std, ours_mean, ours_std = (
        torch.tensor(each)[:, None, None]
        for each in (
            reference.pretrained_cfg["mean"],
            reference.pretrained_cfg["std"],
            IMAGENET_DEFAULT_MEAN,
            IMAGENET_DEFAULT_STD,
        )
    )
    assert not torch.equal(mean, ours_mean)
    pixels = torch.rand(4, 3, 48, 48)
    with torch.no_grad():
        got, want = vit((pixels - ours_mean) / ours_std, Compression(), INDEX), pooled(reference, (pixels - mean) / std)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
