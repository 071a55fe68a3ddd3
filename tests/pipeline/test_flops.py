"""Counted by hand against PyTorch's counter around real steps.

The counter knows no attention of the CPU: the math backend computes it by products of matrices, which it knows. On a
GPU it adds a half to the backward of attention, for the scores that flash attention computes again.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline import distributed
from pipeline.compression import Compression
from pipeline.compression.schedule import compression
from pipeline.engine_config import FSDP2, EngineConfig, Precision, Zero3
from pipeline.engines import build_engine
from pipeline.flops import COUNT_EVERY, StepFlops, step_flops
from pipeline.methods import (
    DINOConfig,
    FineTuneDeiTConfig,
    FineTuneMAEConfig,
    LocalMIMConfig,
    Method,
    MoCoConfig,
    SimCLRConfig,
    build_method,
)
from pipeline.methods.moco import MoCo
from pipeline.models.momentum import CLOSED
from pipeline.models.vit import Positions, ViT, ViTConfig
from pipeline.optim import OptimConfig
from pipeline.schedules import StepPlan

SAMPLES, DEPTH = 8, 3
# What the losses multiply.
TOLERANCE = 0.005
WHOLE = Compression()
CRUSHED = compression(16, 0.5)
DINO = DINOConfig(out_dim=256, hidden_dim=64, bottleneck_dim=32, small_crops=3, small_size=16)
TUNED = {"classes": 40, "average": 0.0}
METHODS = {
    "finetune_deit": FineTuneDeiTConfig(**TUNED),
    "finetune_mae": FineTuneMAEConfig(**TUNED),
    "moco": MoCoConfig(hidden_dim=128, out_dim=32),
    "moco that learns its projection": MoCoConfig(hidden_dim=128, out_dim=32, freeze_patch_projection=False),
    "moco-symmetric": MoCoConfig(hidden_dim=128, out_dim=32, symmetric=True),
    "simclr": SimCLRConfig(hidden_dim=128, out_dim=32),
    "dino": DINO,
    "dino-symmetric": replace(DINO, symmetric=True),
}
LOCALMIM = LocalMIMConfig(taps=[1, 2, 3], doublings=[1, 0, -1], decoder_dim=32, decoder_heads=4)


@dataclass(frozen=True)
class Crops:
    views: tuple[Tensor, ...]
    index: Tensor
    labels: Tensor


def make(config: object, **model: object) -> Method:
    torch.manual_seed(0)
    return build_method(config, ViT(ViTConfig("vit_tiny_patch16_224", 32, 8, 48, DEPTH, 3, **model), seed=0))  # type: ignore[arg-type]


def plan_of(method: Method, query: Compression, frozen: int, last_layer_rate: float = 1e-3) -> StepPlan:
    rates = (0.0,) * frozen + (1e-3,) * (method.encoder.num_layers - frozen)
    return StepPlan(0.5, 1e-3, 0.1, 0.99, rates, query, method.key_compression(query), last_layer_rate, 0.07)


def counted(method: Method, plan: StepPlan) -> int:
    """Return what PyTorch counts around a step, whose frozen parameters the engine would have let go of."""
    frozen = [p for layer in method.layers()[: plan.frozen_layers] for p in layer]
    frozen += [] if plan.last_layer_rate else method.last_layer()
    for parameter in frozen:
        parameter.requires_grad_(False)
    views = tuple(torch.randn(SAMPLES, 3, view.size, view.size) for view in method.views())
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        method(Crops(views, torch.arange(SAMPLES), torch.arange(SAMPLES)), plan).loss.backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("query", "frozen"),
    [*((WHOLE, frozen) for frozen in range(DEPTH + 2)), (compression(None, 0.5), 1), (CRUSHED, 0), (CRUSHED, 2)],
    ids=[*(f"whole-{frozen}" for frozen in range(DEPTH + 2)), "dropout-1", "crushed-0", "crushed-2"],
)
def test_steps_of_methods_with_heads(name: str, query: Compression, frozen: int) -> None:
    method = make(METHODS[name])
    plan = plan_of(method, query, frozen)
    ours = step_flops(method, plan, SAMPLES)
    assert ours == pytest.approx(counted(method, plan), rel=TOLERANCE)


@pytest.mark.parametrize("frozen", range(DEPTH + 1))
def test_steps_with_decoders(frozen: int) -> None:
    method = make(LOCALMIM)
    plan = plan_of(method, WHOLE, frozen)
    ours = step_flops(method, plan, SAMPLES)
    assert ours == pytest.approx(counted(method, plan), rel=TOLERANCE)


@pytest.mark.parametrize("config", [SimCLRConfig(hidden_dim=128, out_dim=32), DINO], ids=["simclr", "dino"])
@pytest.mark.parametrize("frozen", [0, 1])
def test_learned_positions_and_kernels_are_resized_once_a_call(config: object, frozen: int) -> None:
    method = make(config, positions=Positions.learned)
    plan = plan_of(method, CRUSHED, frozen)
    ours = step_flops(method, plan, SAMPLES)
    assert ours == pytest.approx(counted(method, plan), rel=TOLERANCE)


def test_prototypes_that_wait_have_no_gradient_of_weights() -> None:
    method = make(replace(DINO, out_dim=32768))
    waiting, learning = (plan_of(method, WHOLE, 0, rate) for rate in (0.0, 1e-3))
    ours = step_flops(method, waiting, SAMPLES)
    assert ours < 0.95 * step_flops(method, learning, SAMPLES)
    assert ours == pytest.approx(counted(method, waiting), rel=TOLERANCE)


@pytest.mark.parametrize("name", ["moco-symmetric", "dino-symmetric"])
def test_a_prefix_that_both_encoders_share_counts_once(name: str) -> None:
    method, frozen = make(METHODS[name]), 3
    plan = plan_of(method, WHOLE, frozen)
    apart = step_flops(method, plan, SAMPLES)
    (momentum,) = method.momentum_encoders()
    momentum._gaps = [CLOSED / 2] * len(momentum._gaps)
    ours = step_flops(method, plan, SAMPLES)
    assert ours < 0.9 * apart
    assert ours == pytest.approx(counted(method, plan), rel=TOLERANCE)


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[StepPlan]]:
    """Yield the plans whose forwards somebody has asked for."""
    asked: list[StepPlan] = []
    real = MoCo.forwards

    def watched(method: MoCo, plan: StepPlan) -> object:
        asked.append(plan)
        return real(method, plan)

    monkeypatch.setattr(MoCo, "forwards", watched)
    return asked


def test_a_shape_is_counted_once(forwards: list[StepPlan]) -> None:
    method = make(METHODS["moco"])
    count = StepFlops(method, SAMPLES)
    plans = [plan_of(method, query, frozen) for query in (WHOLE, CRUSHED) for frozen in (0, 2)]
    plans += [replace(plan, learning_rate=2e-3, progress=0.6) for plan in plans]
    found = [count(plan) for plan in plans]
    assert len(forwards) == 4
    assert found[:4] == found[4:] == [step_flops(method, plan, SAMPLES) for plan in plans[:4]]
    assert len(set(found)) == 4


def test_layers_that_come_to_be_shared_are_noticed() -> None:
    method = make(METHODS["moco-symmetric"])
    plan = plan_of(method, WHOLE, 3)
    count = StepFlops(method, SAMPLES)
    apart = count(plan)
    (momentum,) = method.momentum_encoders()
    momentum._gaps = [CLOSED / 2] * len(momentum._gaps)
    later = [count(plan) for _ in range(COUNT_EVERY)]
    assert later[0] == apart
    assert later[-1] == step_flops(method, plan, SAMPLES) < apart


@pytest.mark.parametrize("engine", [Zero3(Precision.fp32), FSDP2(Precision.fp32)], ids=["zero3", "fsdp2"])
@pytest.mark.parametrize("config", [METHODS["moco"], DINO, LOCALMIM], ids=["moco", "dino", "localmim"])
def test_an_engine_that_keeps_weights_elsewhere_changes_nothing(engine: EngineConfig, config: object) -> None:
    distributed.start()
    method = make(config)
    plans = [plan_of(method, WHOLE, frozen) for frozen in (0, 2)]
    before = [step_flops(method, plan, SAMPLES) for plan in plans]
    build_engine(method, engine, OptimConfig(), local_batch=SAMPLES, device=torch.device("cpu"))
    assert [step_flops(method, plan, SAMPLES) for plan in plans] == before


def test_a_vit_b_by_hand() -> None:
    with torch.device("meta"):
        method = make(SimCLRConfig(hidden_dim=4096, out_dim=256))
        method.encoder = ViT(ViTConfig("vit_base_patch16_224"), seed=0)
    whole, frozen = (step_flops(method, plan_of(method, WHOLE, frozen), 1) for frozen in (0, 7))
    block = 197 * 24 * 768**2 + 4 * 197**2 * 768
    projection = 2 * 196 * 768 * 768
    head = 2 * (48 * 4096 + 4096 * 4096 + 4096 * 256)
    # Of the projection only the kernel has a gradient.
    assert whole == 2 * (3 * 12 * block + 2 * projection + 3 * head)
    assert frozen == 2 * ((6 + 3 * 6) * block + projection + 3 * head)
