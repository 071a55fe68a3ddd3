"""Counts of steps, and what a report says of single layers."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from monitoring.metrics import check
from pipeline import distributed
from pipeline.checkpoint import TrainState
from pipeline.compression.schedule import compression
from pipeline.engine import Engine
from pipeline.engine_config import EngineConfig, Precision
from pipeline.flops import step_flops
from pipeline.meter import Meter
from pipeline.methods.moco import MoCo
from pipeline.optim import OptimConfig
from pipeline.schedules import Budget, StepPlan, Unit
from pipeline.training_engine import StepResult
from pipeline.tuning import Tuned


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


def test_cost_is_counted_by_real_tokens_and_by_the_papers_formula(
    make_moco: Callable[..., MoCo], make_plan: Callable[..., StepPlan]
) -> None:
    moco = make_moco()
    meter = Meter(moco, Budget(100, Unit.steps), 8)
    plan = make_plan(moco, compression(None, 0.5), frozen=2)
    for applied in (True, False):
        meter.count(plan, StepResult(torch.zeros(()), {}, applied), moco.sample_cost(plan), data_wait=0.5)
    # 17 tokens, 9 of them kept in the query; one of three blocks is frozen. The formula keeps 8.5 and freezes none.
    assert meter.totals["cost_total"] == pytest.approx(2 * 8 * ((3 - 2 / 3) * 9 + 17) / 17)
    assert meter.totals["nominal_cost_total"] == pytest.approx(2 * 8 * (3 * 8.5 + 17) / 17)
    assert meter.totals["uncompressed_cost_total"] == pytest.approx(2 * 8 * 4)
    assert meter.totals["tokens_total"] == 2 * 8 * (9 + 17)
    assert meter.totals["skipped_steps_total"] == 1


def test_rates_are_since_the_last_report_and_leave_pauses_out(
    make_moco: Callable[..., MoCo], make_plan: Callable[..., StepPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("pipeline.meter.time", SimpleNamespace(monotonic=lambda: clock.now, time=lambda: 0.0))
    moco = make_moco()
    meter, plan = Meter(moco, Budget(10, Unit.steps), 8), make_plan(moco, progress=0.2)
    engine = SimpleNamespace(
        layer_norms=lambda: [1.0, float("nan"), 2.0, 0.5], grad_norm=lambda: 1.0, optimizer_bytes=lambda: 7
    )

    def report(seconds: float, steps: int, data_wait: float, done: int) -> dict[str, float]:
        for _ in range(steps):
            meter.count(plan, StepResult(torch.zeros(()), {}, applied=True), 4.0, data_wait)
        clock.now += seconds
        return meter.report(TrainState(step=done), plan, engine, loss=1.0)  # type: ignore[arg-type]

    with meter.paused():
        clock.now += 4.0
    first = report(6.0, steps=2, data_wait=1.5, done=7)
    assert first["samples_per_second"] == pytest.approx(2 * 8 / 6)
    assert first["tokens_per_second"] == pytest.approx(2 * 8 * 34 / 6)
    assert first["cost_per_second"] == pytest.approx(2 * 8 * 4 / 6)
    assert first["step_seconds"] == pytest.approx(3)
    assert first["data_wait_ratio"] == pytest.approx(1.5 / 6)
    # Half of the run in 10 seconds, from 0.2 on: 6 seconds for the last 0.3 of it.
    assert first["eta_seconds"] == pytest.approx(6)
    # A norm that is no number is larger than any.
    assert first["grad_norm_largest_layer"] == 1
    second = report(4.0, steps=1, data_wait=2.5, done=8)
    assert second["samples_per_second"] == pytest.approx(8 / 4)
    assert second["data_wait_ratio"] == pytest.approx(1.0 / 4)


def test_flops_are_those_of_all_processes_and_held_against_all_devices(
    make_moco: Callable[..., MoCo], make_plan: Callable[..., StepPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("pipeline.meter.time", SimpleNamespace(monotonic=lambda: clock.now, time=lambda: 0.0))
    moco = make_moco()
    meters = [Meter(moco, Budget(10, Unit.steps), 8, 2, peak) for peak in (None, 1e9)]
    plans = [make_plan(moco), make_plan(moco, compression(None, 0.5), frozen=2)]
    engine = SimpleNamespace(layer_norms=list, grad_norm=lambda: 1.0, optimizer_bytes=lambda: 7)
    for meter in meters:
        for plan in plans:
            meter.count(plan, StepResult(torch.zeros(()), {}, applied=True), 4.0, 0.0)
    clock.now += 4.0
    unknown, known = (meter.report(TrainState(step=2), plans[0], engine, loss=1.0) for meter in meters)  # type: ignore[arg-type]
    # Each of the two processes has 4 of the 8 samples.
    flops = 2 * sum(step_flops(moco, plan, 4) for plan in plans)
    assert unknown["flops_total"] == flops
    assert unknown["flops_per_second"] == known["flops_per_second"] == flops / 4
    assert "mfu_ratio" not in unknown
    assert known["mfu_ratio"] == pytest.approx(flops / 4 / 2e9)
    check(known)


def test_memory_of_a_gpu_is_reported_as_torch_and_the_driver_say(
    make_moco: Callable[..., MoCo], make_plan: Callable[..., StepPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = {
        "is_available": True,
        "memory_allocated": 10,
        "max_memory_allocated": 30,
        "memory_reserved": 40,
        "mem_get_info": (25, 100),
    }
    for name, value in memory.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    moco = make_moco()
    engine = SimpleNamespace(layer_norms=list, grad_norm=lambda: 1.0, optimizer_bytes=lambda: 7)
    metrics = Meter(moco, Budget(10, Unit.steps), 8).report(TrainState(step=5), make_plan(moco), engine, loss=1.0)  # type: ignore[arg-type]
    names = ("", "_peak", "_reserved", "_used")
    assert [metrics[f"gpu_memory{name}_bytes"] for name in names] == [10, 30, 40, 75]
    check(metrics)


def test_what_a_plan_does_to_tokens_is_reported(
    make_moco: Callable[..., MoCo], make_plan: Callable[..., StepPlan]
) -> None:
    moco = make_moco()
    plan = make_plan(moco, compression(8, 0.25), frozen=2, momentum=0.9)
    engine = SimpleNamespace(layer_norms=list, grad_norm=lambda: 1.0, optimizer_bytes=lambda: 7)
    metrics = Meter(moco, Budget(10, Unit.steps), 8).report(TrainState(step=5), plan, engine, loss=1.0)  # type: ignore[arg-type]
    # 16 patches and the class token; the query keeps 12 of the patches, the key all.
    names = ("patch_size_pixels", "token_dropout_ratio", "query_tokens", "key_tokens", "frozen_layers")
    assert [metrics[name] for name in names] == [8, 0.25, 13, 17, 2]
    assert metrics["momentum_ratio"] == 0.9
    assert metrics["optimizer_bytes"] == 7


def test_the_cost_of_tuning_is_a_part_of_the_cost(make_moco: Callable[..., MoCo]) -> None:
    meter = Meter(make_moco(), Budget(100, Unit.cost), 8)
    for tuned in (Tuned(), Tuned(3.0), Tuned(4.0, moved=True)):
        meter.tuned(tuned)
    totals = meter.totals
    assert (totals["cost_total"], totals["tuning_cost_total"], totals["tuning_moves_total"]) == (7, 7, 1)
