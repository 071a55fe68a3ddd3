"""The same command on a GPU: DALI decodes there, the engine computes in bf16. Skipped where there is none."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import distributed
from pipeline.engine import Engine
from pipeline.engine_config import EngineConfig, Offload, Precision
from pipeline.methods.moco import MoCo
from pipeline.optim import OptimConfig
from pipeline.pieces import Reader
from pipeline.schedules import StepPlan

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("experiment", ["demo", "small_moco", "small_simclr", "small_dino"])
def test_a_run_on_the_gpu_resumes_and_evaluates(
    tmp_path: Path, drawn_shards: Path, experiment: str, precision: str
) -> None:
    def coldpress(command: str, *words: str) -> str:
        argv = [sys.executable, "-m", "pipeline.cli", command, "run=gpu", f"runs={tmp_path}", *words]
        done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    words = [
        f"experiment={experiment}",
        f"data.shards={drawn_shards}",
        f"engine.precision={precision}",
        "batch_size=16",
    ]
    words += ["budget.value=30", "budget.unit=steps", "log_every=1"]
    assert "on cuda" in coldpress("train", *words)
    assert "finished at step 30" in coldpress("train", *words)
    rows = [json.loads(line) for line in (tmp_path / "gpu" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 30
    assert losses[-1] < losses[0]
    assert "top-1" in coldpress("evaluate", "k=[5]")


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize(
    ("stage", "offload"),
    [(1, Offload.optimizer), (2, Offload.optimizer), (3, Offload.optimizer), (3, Offload.parameters)],
)
def test_what_is_on_the_host_changes_no_step_and_moves_back(
    make_moco: Callable[..., MoCo],
    make_batch: Callable[..., Any],
    tmp_path: Path,
    stage: int,
    offload: Offload,
    precision: Precision,
) -> None:
    device = distributed.start().device
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32

    def start(offload: Offload) -> Engine:
        config, optim = EngineConfig(precision, stage, offload, layer_norms=True), OptimConfig(clip_each=0.05)
        return Engine(make_moco(), config, optim, local_batch=8, device=device)

    def step(engine: Engine, number: int) -> list[float]:
        batch = make_batch(start=8 * number)
        batch = replace(
            batch, views=tuple(view.to(device, dtype) for view in batch.views), index=batch.index.to(device)
        )
        rates = tuple(0.0 if i < 2 and number >= 4 else 1e-3 for i in range(4))
        result = engine.step(batch, StepPlan(number / 20, 1e-3, 0.1, 0.9, rates))
        assert result.applied
        return [float(result.loss), engine.grad_norm(), *engine.layer_norms()]

    plain, there = start(Offload.none), start(offload)
    within = 1e-3 if precision is Precision.fp32 else 5e-2
    for number in range(8):
        assert step(there, number) == pytest.approx(step(plain, number), rel=within, abs=within)
    there.save(tmp_path / "there")
    plain.load(tmp_path / "there")
    plain.save(tmp_path / "plain")
    one, other = Reader(tmp_path / "there"), Reader(tmp_path / "plain")
    assert one.names == other.names
    assert not [name for name in one.names if not torch.equal(one.whole(name), other.whole(name))]
    assert step(there, 8) == pytest.approx(step(plain, 8), rel=within, abs=within)
