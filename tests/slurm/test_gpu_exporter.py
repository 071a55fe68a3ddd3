"""The exporter beside a run under a real Slurm; both are a few lines of shell that tell what they met."""

import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Of each process a record of its step and words; the exporter's end is written beside it.
BODY = r"""#!/bin/bash
me="$RECORDS/$1-$SLURMD_NODENAME-${SLURM_RESTART_COUNT:-0}"
printf '%s\n' "$SLURM_STEP_ID" "$@" > "$me"
if [[ $1 == gpu-exporter ]]; then
    trap 'echo left > "$me.end"; exit 0' TERM
    EXPORTER
    while sleep 0.1; do :; done
fi
trap 'mkdir -p "$RUN/checkpoints"; echo "step_${SLURM_RESTART_COUNT:-0}" > "$RUN/checkpoints/latest"; exit 75' USR2
for _ in {1..600}; do
    sleep 0.1
    [[ ! -e $RECORDS/end ]] || exit "$(cat "$RECORDS/end")"
done
"""


class Run:
    """A job of the training script with an exporter beside it."""

    def __init__(self, slurm, directory, exporter):
        self.slurm, self.directory = slurm, directory
        self.nodes = [node.name for node in slurm.nodes]
        (directory / "bin").mkdir()
        command = directory / "bin" / "coldpress"
        command.write_text(BODY.replace("EXPORTER", exporter))
        command.chmod(0o755)
        self.job = slurm.sbatch(
            f"--output={directory / 'log'}",
            f"--nodes={len(self.nodes)}",
            "--ntasks-per-node=1",
            "--gpus-per-node=8",
            "--cpus-per-task=1",
            "slurm/train.sbatch",
            "run=a",
            f"runs={directory / 'runs'}",
            "monitor.address=0.0.0.0",
            cwd=ROOT,
            COLDPRESS_BIN=str(directory / "bin"),
            COLDPRESS_GPU_EXPORTER="true",
            RECORDS=str(directory),
            RUN=str(directory / "runs" / "a"),
        )

    def records(self, kind, life=0, ending=""):
        """Return what each node's process of a kind has written, once all have."""
        paths = [self.directory / f"{kind}-{node}-{life}{ending}" for node in self.nodes]
        end = time.monotonic() + 60
        while not all(path.exists() and path.read_text() for path in paths):
            assert time.monotonic() < end, (self.directory / "log").read_text()
            time.sleep(0.1)
        return [path.read_text().splitlines() for path in paths]

    def end(self, code=0):
        (self.directory / "end").write_text(str(code))
        began = time.monotonic()
        ended = self.slurm.wait(self.job, "COMPLETED", "FAILED")
        # Slurm would kill what does not leave 20 s after it was asked.
        assert time.monotonic() - began < 15
        return ended["JobState"], ended["ExitCode"], ended["Restarts"]


@pytest.fixture
def start(slurm, tmp_path):
    return lambda exporter="": Run(slurm, tmp_path, exporter)


def test_one_a_node_leaves_with_the_job(start):
    run = start()
    [(step, *words), *_] = found = run.records("gpu-exporter")
    assert len(found) == len(run.nodes)
    assert words == ["gpu-exporter", f"runs={run.directory / 'runs'}", "address=0.0.0.0"]
    assert {record[0] for record in run.records("train")} == {"0"}
    assert step == "1"
    assert run.end(code=2) == ("FAILED", "2:0", "0")
    assert run.records("gpu-exporter", ending=".end") == [["left"]] * len(run.nodes)


def test_a_run_that_is_asked_to_leave_comes_back_with_its_exporter(start):
    run = start()
    run.records("gpu-exporter")
    run.slurm.run("scancel", "--batch", "--signal=USR2", run.job)
    run.records("gpu-exporter", life=1)
    assert run.records("gpu-exporter", ending=".end") == [["left"]] * len(run.nodes)
    assert run.end() == ("COMPLETED", "0:0", "1")


def test_an_exporter_that_ends_is_no_matter(start):
    run = start("exit 2")
    run.records("gpu-exporter")
    # Longer than Slurm needs to notice.
    time.sleep(2)
    assert run.slurm.job(run.job)["JobState"] == "RUNNING"
    assert run.end() == ("COMPLETED", "0:0", "0")
