"""The batch scripts under a real Slurm; what they start is a few lines of shell that play one ending of a run."""

import json
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORD = r"""#!/usr/bin/env python3
import json, os, sys
name = f"{os.environ['SLURM_JOB_NAME']}-{os.environ['SLURM_PROCID']}.json"
with open(os.path.join(os.environ["RECORDS"], name), "w") as file:
    json.dump({"argv": sys.argv[1:], "env": dict(os.environ)}, file)
"""
# A life that publishes a checkpoint of its own.
ADVANCE = """
mkdir -p "$RUN/checkpoints" && echo "step_${SLURM_RESTART_COUNT:-0}" > "$RUN/checkpoints/latest"
"""
# Asked to leave, the run saves and says so by its exit code.
WAIT = f"""
trap '{ADVANCE.strip()}; exit 75' TERM
trap 'echo by USR2; {ADVANCE.strip()}; exit 75' USR2
echo ready
for _ in {{1..600}}; do sleep 0.1; done
"""


class Desk:
    """Submits jobs whose coldpress is a script of the test."""

    def __init__(self, slurm, directory):
        self.slurm, self.directory = slurm, directory
        self.log = directory / "log"
        (directory / "bin").mkdir()

    def submit(self, body, *arguments, script="train.sbatch", options=()):
        command = self.directory / "bin" / "coldpress"
        command.write_text(body if body.startswith("#!") else f"#!/bin/bash\n{body}")
        command.chmod(0o755)
        return self.slurm.sbatch(
            f"--output={self.log}",
            *options,
            f"slurm/{script}",
            *arguments,
            cwd=ROOT,
            COLDPRESS_BIN=str(command.parent),
            RECORDS=str(self.directory),
            RUN=str(self.directory / "runs" / "a"),
        )

    def train(self, body, *options):
        """Submit a run of one task."""
        options = [*options, "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
        return self.submit(body, "run=a", f"runs={self.directory / 'runs'}", options=options)

    def wait_for(self, text, count=1):
        end = time.monotonic() + 60
        while not self.log.exists() or self.log.read_text().count(text) < count:
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.05)


@pytest.fixture
def desk(slurm, tmp_path):
    return Desk(slurm, tmp_path)


def records(directory):
    return {p.stem: json.loads(p.read_text()) for p in directory.glob("*.json")}


def test_arguments_and_rendezvous_reach_every_task(desk, tmp_path):
    arguments = [
        "experiment=demo",
        "run=a",
        'data.shards=/with space/it\'s "here"',
        "model.overrides={a: 1}",
        "$HOME *",
    ]
    options = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=3"]
    job = desk.submit(RECORD, *arguments, options=options)
    assert desk.slurm.wait(job)["JobState"] == "COMPLETED", desk.log.read_text()
    tasks = records(tmp_path)
    assert sorted(tasks) == [f"coldpress-{rank}" for rank in range(4)]
    for task in tasks.values():
        assert task["argv"] == ["train", *arguments]
        env = task["env"]
        assert env["MASTER_ADDR"] == desk.slurm.nodes[0].name
        assert env["MASTER_PORT"] == str(20000 + int(job) % 10000)
        assert env["PYTHONSAFEPATH"] == "1"
        assert env["OMP_NUM_THREADS"] == env["SLURM_CPUS_PER_TASK"] == "3"
    assert {t["env"]["SLURMD_NODENAME"] for t in tasks.values()} == {n.name for n in desk.slurm.nodes}


def test_as_shipped_every_gpu_of_a_node_has_its_task(desk, tmp_path):
    job = desk.submit(RECORD, "run=a")
    assert desk.slurm.wait(job)["JobState"] == "COMPLETED", desk.log.read_text()
    tasks = records(tmp_path)
    assert len(tasks) == 8
    assert {t["env"]["CUDA_VISIBLE_DEVICES"] for t in tasks.values()} == {"0,1,2,3,4,5,6,7"}


def test_what_another_launcher_left_in_the_shell_reaches_no_task(desk, tmp_path, monkeypatch):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    for name in names:
        monkeypatch.setenv(name, "0")
    job = desk.submit(RECORD, "run=a", options=["--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"])
    assert desk.slurm.wait(job)["JobState"] == "COMPLETED", desk.log.read_text()
    [task] = records(tmp_path).values()
    assert not [name for name in names if name in task["env"]]


@pytest.mark.parametrize("command", ["shard", "evaluate"])
def test_single_task_scripts_hand_everything_on(command, desk, tmp_path):
    job = desk.submit(RECORD, "source=/a b", script=f"{command}.sbatch")
    assert desk.slurm.wait(job)["JobState"] == "COMPLETED", desk.log.read_text()
    [task] = records(tmp_path).values()
    assert task["argv"] == [command, "source=/a b"]


@pytest.mark.parametrize("ending", ["exit 75", "exit 76", "kill -KILL $$"])
def test_a_saved_hung_or_killed_run_comes_back_until_it_is_done(ending, desk):
    job = desk.train(f"[[ -n ${{SLURM_RESTART_COUNT:-}} ]] && exit 0\n{ADVANCE}{ending}")
    ended = desk.slurm.wait(job, "COMPLETED", "FAILED")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), desk.log.read_text()


def test_the_first_task_to_leave_does_not_take_the_others_along(desk):
    slow = "[[ $SLURM_PROCID == 0 ]] && sleep 2 && echo saved"
    job = desk.train(f"[[ -n ${{SLURM_RESTART_COUNT:-}} ]] && exit 0\n{slow}\n{ADVANCE}exit 75", "--nodes=2")
    assert desk.slurm.wait(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED"
    text = desk.log.read_text()
    assert "0: saved" in text
    assert "tasks ended with 75\n" in text


@pytest.mark.parametrize("code", [75, 76])
def test_a_run_without_progress_is_given_up(code, desk):
    job = desk.train(f"exit {code}")
    ended = desk.slurm.wait(job, "COMPLETED", "FAILED")
    assert (ended["ExitCode"], ended["Restarts"]) == (f"{code}:0", "2")
    assert "not requeued: 3 lives in a row without a new checkpoint" in desk.log.read_text()


def test_the_end_of_the_time_limit_is_announced_and_the_run_comes_back(desk):
    job = desk.train(f"[[ -n ${{SLURM_RESTART_COUNT:-}} ]] && exit 0\n{WAIT}")
    desk.wait_for("ready")
    # What --signal=B:USR2@120 sends: to the batch shell alone.
    desk.slurm.run("scancel", "--batch", "--signal=USR2", job)
    ended = desk.slurm.wait(job, "COMPLETED", "FAILED")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), desk.log.read_text()
    assert "by USR2" in desk.log.read_text()


def test_a_preempted_run_saves_within_the_grace_and_comes_back(desk):
    job = desk.train(f"[[ -n ${{SLURM_RESTART_COUNT:-}} ]] && exit 0\n{WAIT}", "--partition=preemptible")
    desk.wait_for("ready")
    # The tasks get SIGTERM at once, the batch shell nothing until the grace of 60 s is over.
    desk.slurm.sbatch("--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true", cwd=ROOT)
    ended = desk.slurm.wait(job, "COMPLETED", "FAILED")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), desk.log.read_text()
    assert "tasks ended with 75\n" in desk.log.read_text()


def test_a_job_that_its_user_cancels_saves_and_stays_away(desk):
    job = desk.train(WAIT)
    desk.wait_for("ready")
    desk.slurm.run("scancel", job)
    desk.wait_for("tasks ended with 75, cancelled")
    time.sleep(2)
    ended = desk.slurm.job(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")


@pytest.mark.parametrize("code", [1, 2, 77])
def test_a_refusal_or_error_is_final(code, desk):
    job = desk.train(f"echo 'coldpress: no such key' >&2; exit {code}")
    ended = desk.slurm.wait(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", f"{code}:0", "0")


def test_overwrite_is_refused_because_a_requeue_would_repeat_it(desk, tmp_path):
    job = desk.submit(RECORD, "run=a", "overwrite=true")
    assert desk.slurm.wait(job)["ExitCode"] == "2:0"
    assert "overwrite=true would delete the run at every requeue" in desk.log.read_text()
    assert not records(tmp_path)


def test_a_missing_installation_is_one_sentence(desk, tmp_path):
    job = desk.slurm.sbatch(
        f"--output={desk.log}", "slurm/train.sbatch", "run=a", cwd=ROOT, COLDPRESS_BIN=str(tmp_path / "nowhere")
    )
    assert desk.slurm.wait(job)["ExitCode"] == "2:0"
    [line] = desk.log.read_text().splitlines()
    assert f"no coldpress in {tmp_path}/nowhere; " in line
