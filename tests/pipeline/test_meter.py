"""What a report says of single layers."""

from collections.abc import Callable

import pytest
import torch

from monitoring.metrics import check
from pipeline import distributed
from pipeline.checkpoint import TrainState
from pipeline.engine import Engine, EngineConfig, Precision
from pipeline.meter import Meter
from pipeline.methods.moco import MoCo
from pipeline.optim import OptimConfig
from pipeline.schedules import Budget, StepPlan, Unit


def report(moco: MoCo, batch: object, config: EngineConfig, frozen: int) -> dict[str, float]:
    distributed.start()
    engine = Engine(moco, config, OptimConfig(), local_batch=8, device=torch.device("cpu"))
    plan = StepPlan(0.5, 2e-3, 0.1, 0.9, (0.0,) * frozen + (1e-3,) * (4 - frozen))
    engine.step(batch, plan)  # type: ignore[arg-type]
    metrics = Meter(moco, Budget(10, Unit.steps), 8).report(TrainState(step=5), plan, engine, loss=1.0)
    check(metrics)
    return metrics


def test_norms_of_layers_are_those_of_their_gradients(
    make_moco: Callable[..., MoCo], make_batch: Callable[..., object]
) -> None:
    metrics = report(make_moco(), make_batch(), EngineConfig(Precision.fp32, layer_norms=True), frozen=1)
    plain = make_moco()
    plain(make_batch(), StepPlan(0.5, 2e-3, 0.1, 0.9, (0.0,) + (1e-3,) * 3)).loss.backward()

    def norm(parameters: list[torch.nn.Parameter]) -> float:
        return float(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm())

    layers = plain.layers()
    heads = [*plain.projector.parameters(), *plain.predictor.parameters(), *plain.encoder.norm.parameters()]
    assert metrics["grad_norm_embedding"] == 0.0
    assert metrics["grad_norm_first_block"] == pytest.approx(norm(layers[1]), rel=1e-4)
    assert metrics["grad_norm_last_block"] == pytest.approx(norm(layers[3]), rel=1e-4)
    assert metrics["grad_norm_heads"] == pytest.approx(norm(heads), rel=1e-4)
    largest = max((1, 2, 3), key=lambda i: norm(layers[i]))
    assert metrics["grad_norm_largest_layer"] == largest


def test_without_the_switch_nothing_is_said_of_layers(
    make_moco: Callable[..., MoCo], make_batch: Callable[..., object]
) -> None:
    metrics = report(make_moco(), make_batch(), EngineConfig(Precision.fp32), frozen=0)
    assert [name for name in metrics if name.startswith("grad_norm")] == ["grad_norm"]
