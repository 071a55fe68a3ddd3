"""A parameter that takes no part in a step has no gradient in it, at any ZeRO stage and under FSDP2."""

from collections.abc import Callable

import pytest
import torch

from pipeline import distributed
from pipeline.engine_config import FSDP2, EngineConfig, Precision
from pipeline.engines import build_engine
from pipeline.methods.base import Batch, StepOutput
from pipeline.methods.moco import MoCo, MoCoConfig
from pipeline.models.vit import ViT, ViTConfig
from pipeline.optim import OptimConfig
from pipeline.schedules import StepPlan


class Sometimes(MoCo):
    """Leaves its predictor out in the second half of a run."""

    def forward(self, batch: Batch, plan: StepPlan) -> StepOutput:
        if plan.progress < 0.5:
            return super().forward(batch, plan)
        features = self.encoder(batch.views[0], plan.query, batch.index)
        return StepOutput(self.projector(features).square().mean() + features.square().mean(), {})


def norms(stage: int | str, make_batch: Callable[..., Batch]) -> list[float]:
    distributed.start()
    torch.manual_seed(0)
    vit = ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 3, 3, reference_length=17)
    method = Sometimes(MoCoConfig(hidden_dim=64, out_dim=32), ViT(vit, seed=0))
    # Clipped by the global norm, which must not count what is left of earlier steps.
    config = FSDP2(Precision.fp32) if stage == "fsdp2" else EngineConfig(Precision.fp32, stage)
    engine = build_engine(method, config, OptimConfig(clip=0.5), local_batch=8, device=torch.device("cpu"))
    found = []
    for step in range(6):
        engine.step(make_batch(start=8 * step), StepPlan(step / 6, 1e-3, 0.1, 0.9, (1e-3,) * 4))
        found.append(engine.grad_norm())
    return found


@pytest.mark.parametrize("stage", [1, 2, 3, "fsdp2"])
def test_gradients_of_earlier_steps_are_gone(stage: int | str, make_batch: Callable[..., Batch]) -> None:
    assert norms(stage, make_batch) == pytest.approx(norms(0, make_batch), rel=1e-4)
