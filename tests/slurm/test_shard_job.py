"""The shipped sharding script with the real command, a task on each of two nodes, under a real Slurm."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from data.drawn import draw_image_folder
from data.shard import ShardConfig, run

ROOT = Path(__file__).parents[2]
# The real command, whose processes note who they are and wait after every image.
SLOW = f"""#!{sys.executable}
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from data import pack
from pipeline.cli import main

real, pause = pack.as_jpeg, float(os.environ["PAUSE"])

def slow(*given):
    time.sleep(pause)
    return real(*given)

pack.as_jpeg = slow
Path(os.environ["PIDS"], os.environ["SLURM_PROCID"]).write_text(str(os.getpid()))
main()
"""


@pytest.fixture
def submit(slurm, tmp_path):
    """Return a function that submits a sharding of 96 images by two tasks, or one, and returns its job."""
    draw_image_folder(tmp_path / "images", classes=4, per_class=24, size=48)
    run(ShardConfig(str(tmp_path / "images"), str(tmp_path / "whole"), samples_per_shard=5, workers=1))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "coldpress").write_text(SLOW)
    (tmp_path / "bin" / "coldpress").chmod(0o755)

    def submit(tasks, pause=0.0):
        nodes = min(tasks, len(slurm.nodes))
        return slurm.sbatch(
            f"--output={tmp_path / 'log'}",
            f"--nodes={nodes}",
            f"--ntasks-per-node={tasks // nodes}",
            "--cpus-per-task=1",
            "slurm/shard.sbatch",
            f"source={tmp_path / 'images'}",
            f"output={tmp_path / 'out'}",
            "samples_per_shard=5",
            "workers=1",
            cwd=ROOT,
            COLDPRESS_BIN=str(tmp_path / "bin"),
            PAUSE=str(pause),
            PIDS=str(tmp_path),
        )

    return submit


def content(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def wait_for_tars(directory, count, log):
    end = time.monotonic() + 60
    while len(list(directory.glob("*.tar"))) < count:
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.02)


def test_nodes_share_a_sharding_and_the_last_one_merges(slurm, submit, tmp_path):
    job = submit(tasks=2)
    ended, said = slurm.wait(job), (tmp_path / "log").read_text()
    assert ended["JobState"] == "COMPLETED", said
    assert "0: part 1 of 2: 50 of 96 images" in said
    assert "1: part 2 of 2: 46 of 96 images" in said
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_job_that_lost_a_task_ends_and_another_number_of_nodes_goes_on(slurm, submit, tmp_path):
    output, log = tmp_path / "out", tmp_path / "log"
    job = submit(tasks=2, pause=0.1)
    wait_for_tars(output, 3, log)
    os.kill(int((tmp_path / "1").read_text()), signal.SIGKILL)
    ended = slurm.wait(job, timeout=20)
    assert ended["JobState"] == "FAILED", log.read_text()
    assert "part 1 of 2 is finished" not in log.read_text()
    recorded = [output / path.stem for path in output.glob(".unfinished/*.record")]
    kept = {path: path.stat().st_ino for path in recorded}
    assert 2 <= len(kept) < 20
    assert not (output / "manifest.json").exists()
    job = submit(tasks=1)
    assert slurm.wait(job)["JobState"] == "COMPLETED", log.read_text()
    assert content(output) == content(tmp_path / "whole")
    assert {path: path.stat().st_ino for path in kept} == kept


def test_a_requeued_job_goes_on(slurm, submit, tmp_path):
    output, log = tmp_path / "out", tmp_path / "log"
    job = submit(tasks=2, pause=0.05)
    wait_for_tars(output, 3, log)
    slurm.run("scontrol", "requeue", job)
    ended = slurm.wait(job, "COMPLETED", "FAILED")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    assert content(output) == content(tmp_path / "whole")
