"""The same command on a GPU: DALI decodes there, the engine computes in bf16. Skipped where there is none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
