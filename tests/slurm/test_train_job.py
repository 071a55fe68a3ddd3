"""The shipped training script with the real command, on two tasks, under a real Slurm."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from data.drawn import draw_image_folder

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
STEPS = 150


@pytest.fixture
def shards(tmp_path):
    draw_image_folder(tmp_path / "images", classes=4, per_class=24)
    command = [BIN / "coldpress", "shard", f"source={tmp_path / 'images'}", f"output={tmp_path / 'shards'}"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return tmp_path / "shards"


def read_status(runs):
    path = runs / "a" / "status.json"
    return json.loads(path.read_text()) if path.exists() else {"state": "none", "step": 0}


def endpoints(runs):
    """Return what the endpoint of every target file says, by file name."""
    found = {}
    for path in (runs / ".targets").glob("*.json"):
        [entry] = json.loads(path.read_text())
        found[path.name] = urllib.request.urlopen(f"http://{entry['targets'][0]}/metrics", timeout=10).read().decode()
    return found


def wait_for(condition, log, timeout=240):
    end = time.monotonic() + timeout
    while not (result := condition()):
        assert time.monotonic() < end, log.read_text() if log.exists() else "no log"
        time.sleep(0.2)
    return result


def test_a_run_leaves_its_node_comes_back_and_finishes(slurm, shards, tmp_path):
    runs, log = tmp_path / "runs", tmp_path / "log"
    nodes = min(2, len(slurm.nodes))
    job = slurm.sbatch(
        f"--output={log}",
        f"--nodes={nodes}",
        f"--ntasks-per-node={2 // nodes}",
        "--gpus-per-node=0",
        "--cpus-per-task=1",
        "slurm/train.sbatch",
        "experiment=demo",
        "run=a",
        f"runs={runs}",
        f"data.shards={shards}",
        "batch_size=16",
        "log_every=1",
        f"budget={{unit: steps, value: {STEPS}}}",
        cwd=ROOT,
        COLDPRESS_BIN=str(BIN),
    )

    def steps_seen():
        metrics = runs / "a" / "metrics.jsonl"
        return metrics.exists() and metrics.read_text().count("\n") >= 3

    wait_for(steps_seen, log)
    seen = endpoints(runs)
    assert sorted(seen) == ["a-0.json", "a-1.json"]
    for text in seen.values():
        assert "coldpress_samples_total" in text
        assert f'job_id="{job}"' in text
        assert 'world_size="2"' in text

    slurm.run("scancel", "--batch", "--signal=USR2", job)
    ended = slurm.wait(job, "COMPLETED", "FAILED", timeout=300)

    text = log.read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), text
    assert "tasks ended with 75\n" in text
    assert read_status(runs)["state"] == "finished"
    assert read_status(runs)["step"] == STEPS
    [resumed] = [int(line.rpartition(" ")[2]) for line in text.splitlines() if "resumed at step" in line]
    assert 0 < resumed < STEPS
    steps = [json.loads(line)["step"] for line in (runs / "a" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, STEPS + 1))
    assert steps == sorted(steps)
    assert not list((runs / ".targets").iterdir())
    assert not os.listdir(runs / ".lives")
