"""Bytes by shapes against the bytes that two processes really exchange, method by method and engine by engine."""

import json
from collections.abc import Callable
from dataclasses import replace

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
DINO = "DINOConfig(out_dim=24, hidden_dim=40, bottleneck_dim=16, small_crops=1, small_size=16, head_batch_norm={})"
METHODS = {
    "moco": "MoCoConfig(hidden_dim=64, out_dim=32)",
    "moco, symmetric": "MoCoConfig(hidden_dim=64, out_dim=32, symmetric=True)",
    "simclr": "SimCLRConfig(hidden_dim=64, out_dim=32)",
    "dino": DINO.format(False),
    "dino with batch norm": DINO.format(True),
    "localmim": "LocalMIMConfig(taps=[1, 2, 3], doublings=[1, 0, -1], decoder_dim=32, decoder_heads=2)",
}
NOTHING = {"zero_optimization": {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}}
ENGINES = {
    "zero0": "EngineConfig(Precision.bf16, 0)",
    "zero1": "EngineConfig(Precision.bf16, 1)",
    "zero2": "EngineConfig(Precision.fp32, 2)",
    "zero3": "EngineConfig(Precision.bf16, 3)",
    "zero3 that keeps nothing": f"EngineConfig(Precision.fp32, 3, deepspeed={NOTHING})",
    "fsdp2": "FSDP2(Precision.bf16)",
}
# Method, engine, frozen layers.
CASES = [
    ("moco, symmetric", "zero0", 0),
    ("simclr", "zero1", 0),
    ("dino with batch norm", "zero1", 0),
    ("localmim", "zero2", 2),
    ("moco", "zero3", 2),
    ("dino", "zero3 that keeps nothing", 0),
    ("dino", "fsdp2", 2),
    ("moco", "fsdp2", 0),
]
SCRIPT = """
    import json
    import os
    import sys
    from dataclasses import dataclass
    import torch
    import torch.distributed as dist
    from contextlib import nullcontext
    from pipeline import distributed
    from pipeline.benchmarks.collectives import around_collectives
    from pipeline.compression import Compression
    from pipeline.engine_config import FSDP2, EngineConfig, Precision
    from pipeline.engines import build_engine
    from pipeline.methods import DINOConfig, LocalMIMConfig, MoCoConfig, SimCLRConfig, build_method
    from pipeline.models.vit import ViT, ViTConfig
    from pipeline.optim import OptimConfig
    from pipeline.schedules import StepPlan

    world = distributed.start()

    @dataclass(frozen=True)
    class Batch:
        views: tuple
        index: torch.Tensor

    sent = []

    def note(name, num_bytes):
        sent.append(num_bytes)
        return nullcontext()

    def measure(method, engine, frozen):
        torch.manual_seed(0)
        vit = ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 3, 3, reference_length=17)
        method = build_method(eval(method), ViT(vit, seed=0))
        engine = build_engine(method, eval(engine), OptimConfig(), local_batch={samples}, device=world.device)
        rates = (0.0,) * frozen + (1e-3,) * (4 - frozen)
        plan = StepPlan(0.5, 1e-3, 0.1, 0.99, rates, Compression(), Compression(), 1e-3, 0.07)
        views = tuple(torch.randn({samples}, 3, view.size, view.size) for view in method.views())
        batch = Batch(views, torch.arange({samples}))
        # The first steps are not like the others: ZeRO 3 learns the order of its gathers.
        engine.step(batch, plan)
        engine.step(batch, plan)
        sent.clear()
        with around_collectives(note):
            engine.step(batch, plan)
        return sum(sent)

    print(json.dumps([measure(*case) for case in {cases}]))
    dist.barrier()
    sys.stdout.flush()
    # ZeRO 3 over gloo aborts now and then when the interpreter ends.
    os._exit(0)
    """


def make(method: str) -> Method:
    with torch.device("meta"):
        vit = ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 3, 3, reference_length=17)
        return build_method(eval(method), ViT(vit, seed=0))


def plan_of(frozen: int = 0, query: Compression | None = None) -> StepPlan:
    rates = (0.0,) * frozen + (1e-3,) * (4 - frozen)
    return StepPlan(0.5, 1e-3, 0.1, 0.99, rates, query or Compression(), Compression(), 1e-3, 0.07)


def test_bytes_are_those_that_two_processes_exchange(run_ranks: Callable[..., list[str]]) -> None:
    given = [(METHODS[method], ENGINES[engine], frozen) for method, engine, frozen in CASES]
    first, second = map(json.loads, run_ranks(SCRIPT.format(samples=SAMPLES, cases=given), 2))
    assert first == second
    for case, (method, engine, frozen), measured in zip(CASES, given, first, strict=True):
        expected = total(step_traffic(make(method), plan_of(frozen), eval(engine), 2, SAMPLES))
        # Norms, and padding.
        assert expected == pytest.approx(measured, rel=1e-3, abs=600), case
