"""Runs that are killed, resized and damaged end as if nothing had happened."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def campaign(directory: Path, *words: str) -> str:
    """Run a campaign in a process that has no threads, as pytest's own may have, and return what it prints."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE") and not k.startswith("SLURM_")
    }
    paths = {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "chaos.campaign", "--at", str(directory / "campaign"), *words]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment | paths, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_few_chains(tmp_path: Path) -> None:
    said = campaign(tmp_path, "--chains", "3")
    assert "differences                          0" in said


@pytest.mark.slow
def test_two_hundred_deaths(tmp_path: Path) -> None:
    print(campaign(tmp_path, "--deaths", "200", "--seed", str(os.getpid())))
