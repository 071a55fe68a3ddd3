"""A batch in parts: the same step, for losses that are means over samples; a refusal for the others."""

from pathlib import Path

import pytest
import torch

from pipeline import distributed
from pipeline.engine_config import FSDP2, EngineConfig, Precision
from pipeline.engines import build_engine
from pipeline.methods import (
    DINOConfig,
    FineTuneDeiTConfig,
    LocalMIMConfig,
    Method,
    MoCoConfig,
    SimCLRConfig,
    build_method,
)
from pipeline.models.vit import ViT, ViTConfig
from pipeline.optim import OptimConfig
from pipeline.pieces import Reader
from pipeline.schedules import StepPlan
from pipeline.training_engine import TrainingEngine

CONFIGS = {
    "dino": DINOConfig(out_dim=24, hidden_dim=40, bottleneck_dim=16, small_crops=1, small_size=16),
    "localmim": LocalMIMConfig(taps=[1, 2, 3], doublings=[1, 0, -1], decoder_dim=32, decoder_heads=2),
    # Of which each sample is mixed with another one.
    "finetune": FineTuneDeiTConfig(classes=8, average=0.9, erasing=0.5),
}


class Batch:
    def __init__(self, method: Method, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        self.views = tuple(torch.randn(8, 3, v.size, v.size, generator=generator) for v in method.views())
        self.index = torch.arange(8) + 8 * step
        self.labels = torch.arange(8)


def make(config: object, micro_batch: int, stage: int | str, clip_each: float = 0.0) -> TrainingEngine:
    distributed.start()
    torch.manual_seed(0)
    method = build_method(config, ViT(ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 3, 3), seed=0))
    kind, stage = (FSDP2, 3) if stage == "fsdp2" else (EngineConfig, stage)
    engine = kind(Precision.fp32, stage, micro_batch=micro_batch)
    optim = OptimConfig(clip=0.0 if clip_each else 0.5, clip_each=clip_each)
    return build_engine(method, engine, optim, local_batch=8, device=torch.device("cpu"))


def plan(step: int) -> StepPlan:
    rates = tuple(0.0 if step > 2 and i < 2 else 1e-3 for i in range(4))
    return StepPlan(step / 10, 1e-3, 0.1, 0.9, rates, last_layer_rate=1e-3, teacher_temperature=0.07)


@pytest.mark.parametrize(
    ("name", "stage", "clip_each"),
    [
        ("localmim", 0, 0.0),
        ("localmim", 2, 0.0),
        ("finetune", 1, 0.0),
        ("finetune", 3, 0.0),
        ("finetune", "fsdp2", 0.0),
        ("dino", 1, 0.3),
        ("dino", 2, 0.3),
        ("dino", 3, 0.0),
        ("dino", "fsdp2", 0.3),
    ],
)
def test_a_batch_in_parts_is_the_same_step(name: str, stage: int | str, clip_each: float, tmp_path: Path) -> None:
    whole, parts = (make(CONFIGS[name], size, stage, clip_each) for size in (0, 2))
    for step in range(5):
        now = plan(step)
        results = [engine.step(Batch(engine.method, step), now) for engine in (whole, parts)]
        torch.testing.assert_close(results[0].loss, results[1].loss, atol=1e-6, rtol=1e-5)
        assert whole.grad_norm() == pytest.approx(parts.grad_norm(), rel=1e-4)
    for number, engine in enumerate((whole, parts)):
        engine.save(tmp_path / str(number))
    ours, theirs = Reader(tmp_path / "0"), Reader(tmp_path / "1")
    assert ours.facts == theirs.facts
    for tensor in ours.names:
        # Biases of the keys have gradients of nothing but rounding, of which Adam makes steps.
        if not tensor.endswith("qkv.bias"):
            torch.testing.assert_close(ours.whole(tensor), theirs.whole(tensor), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (MoCoConfig(hidden_dim=64, out_dim=32), "its negatives and its heads' batch statistics"),
        (SimCLRConfig(hidden_dim=64, out_dim=32), "its negatives and its head's batch statistics"),
        (DINOConfig(out_dim=24, small_crops=0, head_batch_norm=True), "its head's batch statistics"),
    ],
)
def test_other_negatives_are_never_taken_silently(config: object, reason: str) -> None:
    with pytest.raises(ValueError, match=f"engine.micro_batch must be 0 with .*: {reason} are those of the whole"):
        make(config, 2, 1)


def test_a_part_that_does_not_divide_is_refused_with_the_number() -> None:
    with pytest.raises(ValueError, match=r"must divide the 8 samples that each process takes of a batch, got 3"):
        make(CONFIGS["dino"], 3, 1)


def test_halves_of_a_pair_are_never_in_different_parts() -> None:
    with pytest.raises(ValueError, match=r"engine\.micro_batch must give the networks a multiple of 2 .*, got 1; take"):
        make(CONFIGS["finetune"], 1, 1)
    make(FineTuneDeiTConfig(classes=8, mixup=0.0, cutmix=0.0), 1, 1)


def test_the_whole_batch_may_be_said_for_every_method() -> None:
    make(MoCoConfig(hidden_dim=64, out_dim=32), 8, 1)
