"""State that moves between engines, ZeRO stages and numbers of processes: it stays the same, and training goes on."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.pieces import Reader

# ZeRO's, and the engine without DeepSpeed.
STAGES = (0, 1, 2, 3, "fsdp2")
# Builds an engine of each kind ("2+optimizer": and what is on the host) in one process; `train` saves after five steps,
# of which the last have two frozen layers, `move` loads everything that any number of processes has saved, saves it
# again, and takes one step.
SCRIPT = """
    import json
    import os
    import sys
    from dataclasses import dataclass
    from pathlib import Path
    import torch
    import torch.distributed as dist
    from pipeline import distributed
    from pipeline.engine_config import FSDP2, EngineConfig, Offload, Precision
    from pipeline.engines import build_engine
    from pipeline.methods import DINOConfig, LocalMIMConfig, MoCoConfig, SimCLRConfig, build_method
    from pipeline.models.vit import ViT, ViTConfig
    from pipeline.optim import OptimConfig
    from pipeline.schedules import StepPlan

    CONFIGS = dict(
        moco=MoCoConfig(hidden_dim=64, out_dim=32),
        simclr=SimCLRConfig(hidden_dim=64, out_dim=32),
        dino=DINOConfig(out_dim=24, hidden_dim=40, bottleneck_dim=16, small_crops=1, small_size=16),
        localmim=LocalMIMConfig(taps=[1, 2, 3], doublings=[1, 0, -1], decoder_dim=32, decoder_heads=2),
    )
    METHOD, TASK, STAGES, SCRATCH = "{method}", "{task}", {stages}, Path("{scratch}")
    PRECISION = Precision("{precision}")
    DTYPE = torch.bfloat16 if PRECISION is Precision.bf16 else torch.float32
    world = distributed.start()
    LOCAL = 8 // world.size

    @dataclass(frozen=True)
    class Batch:
        views: tuple
        index: torch.Tensor

    def mine(tensor):
        return tensor[world.rank * LOCAL : (world.rank + 1) * LOCAL]

    def batch(method, step):
        generator = torch.Generator().manual_seed(step)
        sizes = [view.size for view in method.views()]
        views = [mine(torch.randn(8, 3, size, size, generator=generator)).to(DTYPE) for size in sizes]
        return Batch(tuple(views), mine(torch.arange(8) + 8 * step))

    def plan(step):
        rates = tuple(0.0 if i < 2 and step > 2 else 1e-3 * (i + 1) for i in range(4))
        last = 0.0 if step < 2 else 1e-3
        return StepPlan(step / 20, 2e-3, 0.1, 0.9, rates, last_layer_rate=last, teacher_temperature=0.07)

    def make(stage, seed):
        torch.manual_seed(seed)
        stage, _, offload = str(stage).partition("+")
        vit = ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 3, 3, reference_length=17)
        clip = dict(clip_each=0.5) if METHOD == "dino" else dict(clip=0.5)
        return build_engine(
            build_method(CONFIGS[METHOD], ViT(vit, seed=0)),
            FSDP2(PRECISION) if stage == "fsdp2" else EngineConfig(PRECISION, int(stage), Offload(offload or "none")),
            OptimConfig(decay_vectors=False, **clip),
            local_batch=LOCAL,
            device=world.device,
        )

    def step(engine, number):
        result = engine.step(batch(engine.method, number), plan(number))
        return float(distributed.mean_over_ranks(result.loss)), engine.grad_norm()

    def train(stage):
        engine = make(stage, seed=0)
        losses = [step(engine, number) for number in range(5)]
        engine.save(SCRATCH / f"{{world.size}}-{{stage}}")
        return dict(losses=losses, next=step(engine, 5))

    def move(stage):
        # One engine for all: what it knows of the state before must not show in the next.
        engine, steps = make(stage, seed=1), {{}}
        for source in sorted(p for p in SCRATCH.iterdir() if "to" not in p.name):
            engine.load(source)
            engine.save(SCRATCH / f"{{source.name}}-to-{{world.size}}-{{stage}}")
            steps[source.name] = step(engine, 5)
        return steps

    report = {{stage: globals()[TASK](stage) for stage in STAGES}}
    if world.is_main:
        print(json.dumps(report))
    dist.barrier()
    sys.stdout.flush()
    # ZeRO 3 over gloo aborts now and then when the interpreter ends.
    os._exit(0)
    """
Run = Callable[..., list[str]]


def report(run_ranks: Run, ranks: int, **values: object) -> dict[str, dict]:
    values = {"stages": STAGES, "precision": "fp32"} | values
    return json.loads(run_ranks(SCRIPT.format(**values), ranks)[0].splitlines()[-1])


def assert_moved(scratch: Path, source: Path) -> None:
    """Assert that wherever a state was taken, all of it arrived to the bit, and nothing else did."""
    moved = [p for p in scratch.iterdir() if p.name.startswith(f"{source.name}-to-")]
    assert moved
    before = Reader(source)
    for path in moved:
        after = Reader(path)
        assert after.names == before.names
        assert after.facts == before.facts
        assert not [n for n in before.names if not equal(before.whole(n), after.whole(n))], path.name


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether all values are equal; of what is frozen FSDP2 keeps bf16's in fp32."""
    return torch.equal(
        one.to(torch.promote_types(one.dtype, torch.float32)), other.to(torch.promote_types(one.dtype, torch.float32))
    )


def test_any_stage_on_any_number_of_processes_takes_over_from_any_other(run_ranks: Run, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    trained = {ranks: report(run_ranks, ranks, method="moco", task="train", scratch=scratch) for ranks in (1, 2, 4)}
    moved = {ranks: report(run_ranks, ranks, method="moco", task="move", scratch=scratch) for ranks in (1, 2, 4)}
    everything = [run[stage] for run in trained.values() for stage in run]
    for each in everything:
        torch.testing.assert_close(each["losses"], everything[0]["losses"], atol=2e-4, rtol=1e-4)
    for source in (f"{ranks}-{stage}" for ranks in (1, 2, 4) for stage in STAGES):
        assert_moved(scratch, scratch / source)
        ranks, stage = source.split("-")
        expected = trained[int(ranks)][stage]["next"]
        for targets in moved.values():
            for steps in targets.values():
                torch.testing.assert_close(steps[source], expected, atol=1e-5, rtol=1e-5)
        # At home it goes on to the bit.
        assert moved[int(ranks)][stage][source] == expected


@pytest.mark.parametrize(
    ("method", "precision", "before", "after"),
    [
        ("simclr", "fp32", (2, 3), (1, 0)),
        ("dino", "fp32", (1, 1), (2, 3)),
        ("dino", "bf16", (2, 3), (2, 1)),
        ("localmim", "fp32", (2, 0), (4, 2)),
        ("localmim", "bf16", (1, 2), (2, 3)),
        ("moco", "bf16", (2, 1), (1, 3)),
        ("dino", "bf16", (1, 0), (1, "fsdp2")),
        ("localmim", "bf16", (1, "fsdp2"), (1, 3)),
    ],
)
def test_other_methods_and_bf16(
    run_ranks: Run, tmp_path: Path, method: str, precision: str, before: tuple[object, ...], after: tuple[object, ...]
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    values = {"method": method, "precision": precision, "scratch": scratch}
    trained = report(run_ranks, before[0], task="train", stages=before[1:], **values)
    moved = report(run_ranks, after[0], task="move", stages=after[1:], **values)
    source = "-".join(map(str, before))
    assert_moved(scratch, scratch / source)
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    expected, found = trained[str(before[1])]["next"], moved[str(after[1])][source]
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("precision", "before", "after"),
    [
        ("fp32", (2, "2+optimizer", "3"), (1, "3+parameters", "1")),
        ("bf16", (1, "3+parameters", "0"), (2, "1+optimizer", "3+optimizer")),
    ],
)
def test_state_moves_to_the_host_and_back(
    run_ranks: Run, tmp_path: Path, precision: str, before: tuple[int, str, str], after: tuple[int, str, str]
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    values = {"method": "dino", "precision": precision, "scratch": scratch}
    trained = report(run_ranks, before[0], task="train", stages=before[1:], **values)
    moved = report(run_ranks, after[0], task="move", stages=after[1:], **values)
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for stage in before[1:]:
        source = f"{before[0]}-{stage}"
        assert_moved(scratch, scratch / source)
        for steps in moved.values():
            torch.testing.assert_close(steps[source], trained[stage]["next"], atol=tolerance, rtol=tolerance)
