"""Bytes by shapes against the bytes that two processes really exchange, method by method and engine by engine."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.compression import Compression
from pipeline.compression.schedule import compression
from pipeline.engine_config import FSDP2, EngineConfig, Precision
from pipeline.methods import DINOConfig, LocalMIMConfig, Method, MoCoConfig, SimCLRConfig, build_method
from pipeline.models.vit import ViT, ViTConfig
from pipeline.schedules import StepPlan
from pipeline.traffic import Collective, Kind, What, step_traffic, total

SAMPLES = 8
VIT = ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 3, 3, reference_length=17)
MOCO = MoCoConfig(hidden_dim=64, out_dim=32)
# A center that is not lost in the tolerance.
DINO = {"out_dim": 2048, "hidden_dim": 40, "bottleneck_dim": 16, "small_crops": 1, "small_size": 16}
LOCALMIM = LocalMIMConfig(taps=[1, 2, 3], doublings=[1, 0, -1], decoder_dim=32, decoder_heads=2)
NOTHING = {"zero_optimization": {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}}
# Method, engine, frozen layers.
CASES = [
    (MoCoConfig(hidden_dim=64, out_dim=32, symmetric=True), EngineConfig(Precision.bf16, 0), 0),
    (SimCLRConfig(hidden_dim=64, out_dim=32), EngineConfig(Precision.bf16, 1), 0),
    (DINOConfig(**DINO, head_batch_norm=True), EngineConfig(Precision.fp32, 1), 0),
    (LOCALMIM, EngineConfig(Precision.fp32, 2), 2),
    (MOCO, EngineConfig(Precision.bf16, 3), 2),
    # Of the two passes of its student nothing stays.
    (DINOConfig(**DINO), EngineConfig(Precision.fp32, 3, deepspeed=NOTHING), 0),
    (DINOConfig(**DINO), FSDP2(Precision.bf16), 2),
    (MOCO, FSDP2(Precision.fp32), 0),
]
SCRIPT = """
    import json
    import os
    import pickle
    import sys
    from contextlib import nullcontext
    from dataclasses import dataclass
    from pathlib import Path
    import torch
    import torch.distributed as dist
    from pipeline import distributed
    from pipeline.benchmarks.collectives import around_collectives
    from pipeline.engines import build_engine
    from pipeline.methods import build_method
    from pipeline.models.vit import ViT
    from pipeline.optim import OptimConfig

    world = distributed.start()
    sent = []

    @dataclass(frozen=True)
    class Batch:
        views: tuple
        index: torch.Tensor

    def note(name, num_bytes):
        sent.append(num_bytes)
        return nullcontext()

    def measure(vit, method, engine, plan, samples):
        torch.manual_seed(0)
        method = build_method(method, ViT(vit, seed=0))
        engine = build_engine(method, engine, OptimConfig(), local_batch=samples, device=world.device)
        views = tuple(torch.randn(samples, 3, view.size, view.size) for view in method.views())
        batch = Batch(views, torch.arange(samples))
        # The first steps are not like the others: ZeRO 3 learns the order of its gathers.
        engine.step(batch, plan)
        engine.step(batch, plan)
        sent.clear()
        with around_collectives(note):
            engine.step(batch, plan)
        return sum(sent)

    cases = pickle.loads(Path("{cases}").read_bytes())
    print(json.dumps([measure(*case) for case in cases]))
    dist.barrier()
    sys.stdout.flush()
    # ZeRO 3 over gloo aborts now and then when the interpreter ends.
    os._exit(0)
    """


def make(method: object) -> Method:
    with torch.device("meta"):
        return build_method(method, ViT(VIT, seed=0))


def plan_of(frozen: int = 0, query: Compression | None = None) -> StepPlan:
    rates = (0.0,) * frozen + (1e-3,) * (4 - frozen)
    query = query or Compression()
    return StepPlan(0.5, 1e-3, 0.1, 0.99, rates, query, query, 1e-3, 0.07)


def test_bytes_are_those_that_two_processes_exchange(run_ranks: Callable[..., list[str]], tmp_path: Path) -> None:
    file = tmp_path / "cases"
    file.write_bytes(pickle.dumps([(VIT, method, engine, plan_of(k), SAMPLES) for method, engine, k in CASES]))
    first, second = map(json.loads, run_ranks(SCRIPT.format(cases=file), 2))
    assert first == second
    for (method, engine, frozen), measured in zip(CASES, first, strict=True):
        expected = total(step_traffic(make(method), plan_of(frozen), engine, 2, SAMPLES))
        # Norms, and padding.
        assert expected == pytest.approx(measured, rel=1e-3, abs=600), (method, engine)


def test_by_hand() -> None:
    gradients, weights, *batch = step_traffic(make(MOCO), plan_of(), EngineConfig(Precision.bf16, 1), 16, SAMPLES)
    block = (48 * 3 * 48 + 3 * 48) + (48 * 48 + 48) + 2 * 2 * 48 + (48 * 192 + 192) + (192 * 48 + 48)
    # Three linear layers and two batch norms that learn, then two and one; class token, last norm.
    heads = (48 * 64 + 64 * 64 + 64 * 32) + (32 * 64 + 64 * 32) + 3 * 2 * 64
    learning = 3 * block + 48 + 2 * 48 + heads
    assert gradients == Collective(What.gradients, Kind.all_reduce, 4 * learning, 1)
    assert (weights.kind, weights.num_bytes) == (Kind.all_gather, 2 * learning)
    # Means and variances of each batch norm, there and back; those of the momentum projector, and the keys.
    statistics = 2 * (64 + 64 + 32)
    gathered = 16 * 4 * (statistics + 2 * (64 + 32) + statistics + SAMPLES * 32)
    assert total(batch) == gathered + 16 * 4 * (statistics + 2 * (64 + 32))


def test_compression_sends_as_much_and_frozen_layers_less() -> None:
    engine = EngineConfig(Precision.bf16, 1)
    whole, crushed, frozen = (
        step_traffic(make(MOCO), plan, engine, 2, SAMPLES)
        for plan in (plan_of(), plan_of(query=compression(16, 0.5)), plan_of(frozen=3))
    )
    assert whole == crushed
    assert total(frozen, What.gradients) < 0.7 * total(whole, What.gradients)
    assert total(frozen, What.batch) == total(whole, What.batch)


def test_one_process_sends_nothing() -> None:
    assert step_traffic(make(MOCO), plan_of(), EngineConfig(), 1, SAMPLES) == []


def test_a_ring_sends_its_part_once_or_twice() -> None:
    assert Collective(What.weights, Kind.all_gather, 800).sent(8) == 700
    assert Collective(What.gradients, Kind.reduce_scatter, 800).sent(8) == 700
    assert Collective(What.gradients, Kind.all_reduce, 800).sent(8) == 1400
