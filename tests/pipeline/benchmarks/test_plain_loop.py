"""The plain loop is a fair peer: the same losses as ours, step after step, from the same weights on the same images."""

from dataclasses import replace

import pytest
import torch

from pipeline import distributed
from pipeline.benchmarks.cases import NoiseBatch, make_engine, make_plan
from pipeline.benchmarks.peers.plain_loop import PlainLoop
from pipeline.compose import load
from pipeline.compression import Compression
from pipeline.config import BenchConfig
from pipeline.methods import Method, build_method
from pipeline.models.vit import ViT

CPU = torch.device("cpu")
SMALL = ["model.name=vit_tiny_patch16_224", "model.image_size=32", "model.patch_size=8", "model.depth=2"]
SMALL += ["model.embed_dim=48", "engine.precision=fp32", "batch_size=8", "rate.base=0.02"]
HEADS = ["method.hidden_dim=64", "method.out_dim=32"]
DINO = ["method=dino", *HEADS, "method.bottleneck_dim=16", "method.small_crops=2", "method.small_size=16"]
# Of both: a branch that is skipped is drawn elsewhere.
DINO += ["model.stochastic_depth=0", "optim.clip_each=0.05"]
METHODS = {
    "moco": HEADS,
    "moco, symmetric, clipped": [*HEADS, "method.symmetric=true", "optim.clip=0.05"],
    "moco that learns its projection": [*HEADS, "method.freeze_patch_projection=false"],
    "simclr": ["method=simclr", *HEADS],
    "simclr with anchors of one view": ["method=simclr", *HEADS, "method.symmetric=false"],
    "dino": DINO,
    "dino, symmetric, with batch norm": [*DINO, "method.symmetric=true", "method.head_batch_norm=true"],
    "dino with lengths": [*DINO, "method.norm_last_layer=false"],
}
STEPS = 4


def plain(config: BenchConfig) -> tuple[PlainLoop, Method]:
    torch.manual_seed(0)
    method = build_method(config.method, ViT(config.model, 0))
    return PlainLoop(method, config.optim, config.engine.precision, CPU), method


def batch_of(method: Method, seed: int) -> NoiseBatch:
    generator = torch.Generator().manual_seed(seed)
    views = tuple(torch.randn(8, 3, view.size, view.size, generator=generator) for view in method.views())
    return NoiseBatch(views, torch.arange(8))


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_ours(name: str) -> None:
    config = load("bench", [*SMALL, *METHODS[name]])
    engine, method = make_engine(config, distributed.start())
    loop, _ = plain(config)
    plan = replace(make_plan(config, method, Compression(), 0), momentum=0.9)
    errors = []
    for step in range(STEPS):
        batch = batch_of(method, step)
        errors.append(abs(loop.step(batch.views, plan) - float(engine.step(batch, plan).loss)))
    # The first from equal weights; then AdamW, clipping, momentum networks and center have moved them.
    assert errors[0] < 1e-5
    assert max(errors) < 2e-4, errors
