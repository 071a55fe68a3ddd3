"""What each method computes in when the engine's networks are bf16."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from pipeline import distributed
from pipeline.compression.schedule import compression
from pipeline.engine import Engine
from pipeline.engine_config import EngineConfig, Precision
from pipeline.methods import DINOConfig, Method, MoCoConfig, SimCLRConfig, build_method
from pipeline.methods.dino import DINO
from pipeline.models.vit import ViT, ViTConfig
from pipeline.optim import OptimConfig
from pipeline.schedules import StepPlan

CONFIGS = {
    "moco": MoCoConfig(hidden_dim=64, out_dim=32),
    "simclr": SimCLRConfig(hidden_dim=64, out_dim=32),
    "dino": DINOConfig(out_dim=24, hidden_dim=40, bottleneck_dim=16, small_crops=2, small_size=16),
}


@dataclass(frozen=True)
class Crops:
    views: tuple[Tensor, ...]
    index: Tensor


def make_engine(name: str, precision: Precision) -> Engine:
    distributed.start()
    torch.manual_seed(0)
    vit = ViT(ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 3, 3, stochastic_depth=0.1), seed=0)
    method = build_method(CONFIGS[name], vit)
    # The first norm makes a thousand times its rounding of a class token that is almost zero.
    torch.nn.init.normal_(vit.class_token)
    return Engine(method, EngineConfig(precision), OptimConfig(), local_batch=16, device=torch.device("cpu"))


def make_crops(method: Method, step: int) -> Crops:
    generator = torch.Generator().manual_seed(step)
    views = tuple(torch.randn(16, 3, view.size, view.size, generator=generator) for view in method.views())
    return Crops(views, torch.arange(16 * step, 16 * step + 16))


def step_plan(method: Method) -> StepPlan:
    query = compression(16, 0.25)
    return StepPlan(0.5, 1e-3, 0.1, 0.9, (1e-3,) * 4, query, method.key_compression(query), 1e-3, 0.07)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_steps_in_bf16_are_those_in_fp32_up_to_rounding(name: str) -> None:
    half, full = (make_engine(name, precision) for precision in (Precision.bf16, Precision.fp32))
    assert {p.dtype for p in half.method.parameters()} == {torch.bfloat16}
    for step in range(3):
        results = [each.step(make_crops(each.method, step), step_plan(each.method)) for each in (half, full)]
        assert all(result.applied for result in results)
        got, want = (result.loss for result in results)
        assert got.dtype == torch.float32
        # bf16 has 8 bits: 0.4 % of each of many roundings, and of the losses' differences between samples.
        torch.testing.assert_close(got, want, atol=0, rtol=0.02)
    # A target network and a center are averages, whose small steps bf16 would lose.
    assert {t.dtype for name, t in half.method.state().items() if name != "gaps"} <= {torch.float32}
    for name_of, tensor in half.method.state().items():
        torch.testing.assert_close(tensor, full.method.state()[name_of], atol=2e-2, rtol=2e-2)


def test_prototypes_and_targets_of_a_bf16_dino_are_fp32() -> None:
    engine = make_engine("dino", Precision.bf16)
    method = engine.method
    assert isinstance(method, DINO)
    features = torch.randn(16, 48).bfloat16()
    logits = method.head(features)
    assert logits.dtype == torch.float32
    exact = copy.deepcopy(method.head).double()
    # From the bottleneck on: equal to the head in fp64, but for the roundings of its bf16 layers.
    bottleneck = method.head.mlp(features)
    want = exact.prototypes(torch.nn.functional.normalize(bottleneck.double(), dim=1))
    torch.testing.assert_close(logits.double(), want, atol=1e-6, rtol=0)
    assert {each.dtype for each in method._teach(make_crops(method, 0), step_plan(method), {}).values()} == {
        torch.float32
    }
