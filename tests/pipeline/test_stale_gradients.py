"""A parameter that takes no part in a step has no gradient in it, at any ZeRO stage and under FSDP2."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from pipeline import distributed
from pipeline.engine import Engine
from pipeline.engine_config import FSDP2, EngineConfig, Offload, Precision
from pipeline.engines import build_engine
from pipeline.methods.base import Batch, StepOutput
from pipeline.methods.localmim import LocalMIM, LocalMIMConfig
from pipeline.methods.moco import MoCo, MoCoConfig
from pipeline.models.vit import ViT, ViTConfig
from pipeline.optim import OptimConfig
from pipeline.schedules import StepPlan


@dataclass(frozen=True)
class OneView:
    views: tuple[torch.Tensor, ...]
    index: torch.Tensor
    labels: torch.Tensor | None = None


class Sometimes(MoCo):
    """Leaves its predictor out in the second half of a run."""

    def forward(self, batch: Batch, plan: StepPlan) -> StepOutput:
        if plan.progress < 0.5:
            return super().forward(batch, plan)
        features = self.encoder(batch.views[0], plan.query, batch.index)
        return StepOutput(self.projector(features).square().mean() + features.square().mean(), {})


def norms(stage: int | str, make_batch: Callable[..., Batch], offload: Offload = Offload.none) -> list[float]:
    distributed.start()
    torch.manual_seed(0)
    vit = ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 3, 3, reference_length=17)
    method = Sometimes(MoCoConfig(hidden_dim=64, out_dim=32), ViT(vit, seed=0))
    # Clipped by the global norm, which must not count what is left of earlier steps.
    config = EngineConfig(Precision.fp32, 0 if stage == "fsdp2" else int(stage), offload, layer_norms=True)
    if stage == "fsdp2":
        config = FSDP2(Precision.fp32, layer_norms=True)
    engine = build_engine(method, config, OptimConfig(clip=0.5), local_batch=8, device=torch.device("cpu"))
    left_out = {id(p) for p in method.predictor.parameters()}
    found = []
    for step in range(6):
        engine.step(make_batch(start=8 * step), StepPlan(step / 6, 1e-3, 0.1, 0.9, (1e-3,) * 4))
        found.append(engine.grad_norm())
        measured = zip(engine._norms._members, engine._norms.squares.tolist(), strict=True)
        left = [square for parameter, square in measured if id(parameter) in left_out]
        assert sum(left) > 1.0 if step < 3 else not any(left), (step, left)
    return found


OFFLOADED = [(1, Offload.optimizer), (2, Offload.optimizer), (3, Offload.optimizer), (3, Offload.parameters)]


@pytest.mark.parametrize(("stage", "offload"), [*((stage, Offload.none) for stage in (1, 2, 3, "fsdp2")), *OFFLOADED])
def test_gradients_of_earlier_steps_are_gone(
    stage: int | str, offload: Offload, make_batch: Callable[..., Batch]
) -> None:
    assert norms(stage, make_batch, offload) == pytest.approx(norms(0, make_batch), rel=1e-4)


class Late(LocalMIM):
    """Has a layer that only the second part of each batch goes through."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = LocalMIMConfig(taps=[1, 2, 3], doublings=[1, 0, -1], decoder_dim=32, decoder_heads=2)
        super().__init__(config, ViT(ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 3, 3, reference_length=17), seed=0))
        self.late = torch.nn.Linear(48, 8)

    def forward(self, batch: Batch, plan: StepPlan) -> StepOutput:
        output = super().forward(batch, plan)
        features = self.encoder(batch.views[0], plan.query, batch.index)
        if int(batch.index[0]) % 8:
            features = self.late(features)
        return StepOutput(output.loss + features.square().mean(), output.metrics)


def norms_in_parts(stage: int, offload: Offload) -> list[float]:
    distributed.start()
    config = EngineConfig(Precision.fp32, stage, offload, micro_batch=4, layer_norms=True)
    engine = Engine(Late(), config, OptimConfig(), local_batch=8, device=torch.device("cpu"))
    found = []
    for step in range(3):
        view = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        batch = OneView((view,), torch.arange(8 * step, 8 * step + 8))
        engine.step(batch, StepPlan(step / 6, 1e-3, 0.1, 0.9, (1e-3,) * 4))
        found += [engine.grad_norm(), *engine.layer_norms()]
    return found


@pytest.mark.parametrize(("stage", "offload"), OFFLOADED)
def test_parts_of_earlier_steps_are_gone(stage: int, offload: Offload) -> None:
    assert norms_in_parts(stage, offload) == pytest.approx(norms_in_parts(1, Offload.none), rel=1e-4)
