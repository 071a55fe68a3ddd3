"""Compiled blocks: how many graphs, what shares them, and the same numbers."""

import copy
import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from pipeline.compression import Compression
from pipeline.compression.schedule import compression
from pipeline.models.blocks import CompiledBlocks, EagerBlocks
from pipeline.models.vit import ViT, ViTConfig

CONFIG = ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 3, 3, stochastic_depth=0.2)
INDEX = torch.arange(4)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_vit(backend: str) -> ViT:
    torch.manual_seed(0)
    vit = ViT(CONFIG, seed=0)
    vit.run_block = CompiledBlocks(backend)
    return vit


def gradients(vit: ViT, images: torch.Tensor, frozen: int = 0) -> list[torch.Tensor]:
    cell = compression(None, 0.5)
    features = vit(images, cell, INDEX, frozen_layers=frozen, stochastic=True)
    live = [p for layer in vit.layers()[frozen:] for p in layer]
    return [features, *torch.autograd.grad(features.square().sum(), live)]


def test_blocks_run_eagerly_unless_the_config_says_otherwise() -> None:
    assert type(ViT(CONFIG, 0).run_block) is EagerBlocks
    assert type(ViT(replace(CONFIG, compile=True), 0).run_block) is CompiledBlocks


def test_equal_blocks_and_copies_share_one_graph_for_each_shape() -> None:
    vit = compiled_vit("eager")
    names, images = list(vit.state_dict()), torch.randn(4, 3, 32, 32)
    vit(images, Compression(), INDEX)
    assert vit.run_block.graphs == 1
    vit(images, compression(None, 0.5), INDEX)
    assert vit.run_block.graphs == 2
    with torch.no_grad():
        vit(images, compression(None, 0.5), INDEX)
    assert vit.run_block.graphs == 3
    twin = copy.deepcopy(vit)
    assert all(p is not q for p, q in zip(vit.parameters(), twin.parameters(), strict=True))
    twin(images, Compression(), INDEX)
    assert twin.run_block.graphs == 3
    assert list(vit.state_dict()) == list(twin.state_dict()) == names


def test_there_may_be_more_graphs_than_torch_usually_allows() -> None:
    vit = compiled_vit("eager")
    for rows in range(1, 13):
        vit(torch.randn(rows, 3, 32, 32), Compression(), torch.arange(rows))
    assert vit.run_block.graphs == 12


def test_evaluation_runs_eagerly() -> None:
    vit = compiled_vit("eager").eval()
    vit(torch.randn(4, 3, 32, 32), Compression(), INDEX)
    assert vit.run_block.graphs == 0


def test_only_what_is_compiled_after_the_seal_is_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    vit = compiled_vit("eager")
    images = torch.randn(4, 3, 32, 32)
    vit(images, Compression(), INDEX)
    vit.run_block.seal()
    with caplog.at_level(logging.WARNING, "pipeline"):
        vit(images, Compression(), INDEX)
        assert vit.run_block.recompiles == 0
        for _ in range(3):
            vit(images[:2], compression(None, 0.5), INDEX[:2])
    assert vit.run_block.recompiles == 1
    (message,) = [r.getMessage() for r in caplog.records if r.name == "pipeline.models.blocks"]
    assert "[rows, tokens, width] = [2, 9, 48] with gradient" in message


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("frozen", [0, 2])
def test_compiled_blocks_give_the_same_features_and_gradients(backend: str, frozen: int) -> None:
    vit, images = compiled_vit(backend), torch.randn(4, 3, 32, 32)
    # timm's class token is almost zero, of which the first norm makes a thousand times its rounding.
    torch.nn.init.normal_(vit.class_token)
    got = gradients(vit, images, frozen)
    vit.run_block = EagerBlocks()
    for a, b in zip(got, gradients(vit, images, frozen), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
