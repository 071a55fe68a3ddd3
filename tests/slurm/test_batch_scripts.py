"""The batch scripts under a real Slurm; what they start is a few lines of shell that play one ending of a run."""

import json
import os
import socket
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

    def submit(self, body, *arguments, script="train.sbatch", options=(), **environment):
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
            **environment,
        )

    def train(self, body, *options, **environment):
        """Submit a run of one task."""
        options = [*options, "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
        return self.submit(body, "run=a", f"runs={self.directory / 'runs'}", options=options, **environment)

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


def test_an_evaluation_that_is_asked_to_leave_comes_back(desk):
    body = '[[ -n ${SLURM_RESTART_COUNT:-} ]] && exit 0\nmkdir -p "$RUN/eval" && touch "$RUN/eval/part"\nexit 75'
    job = desk.submit(body, "run=a", f"runs={desk.directory}/runs", script="evaluate.sbatch")
    ended = desk.slurm.wait(job, "COMPLETED", "FAILED")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), desk.log.read_text()
    assert not os.listdir(desk.directory / "runs" / ".lives")


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


def test_a_run_that_reaches_its_time_limit_comes_back(desk):
    # Slurm looks at limits every half minute, and signals up to a minute early.
    options = ("--time=1", "--signal=B:USR2@59")
    job = desk.train(f"[[ -n ${{SLURM_RESTART_COUNT:-}} ]] && exit 0\n{WAIT}", *options)
    ended = desk.slurm.wait(job, "COMPLETED", "FAILED", "TIMEOUT", timeout=150)
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


def test_every_task_analyzes(desk, tmp_path):
    options = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
    job = desk.submit(RECORD, "run=a b", script="analyze.sbatch", options=options)
    assert desk.slurm.wait(job)["JobState"] == "COMPLETED", desk.log.read_text()
    tasks = records(tmp_path)
    assert len(tasks) == 2
    for task in tasks.values():
        assert task["argv"] == ["analyze", "run=a b"]
        assert task["env"]["MASTER_ADDR"] == desk.slurm.nodes[0].name


def test_what_a_site_says_is_read_and_not_run(desk, tmp_path):
    site = tmp_path / "site.env"
    site.write_text(
        "# comment\n\n"
        "NCCL_DEBUG=WARN\n"
        f'COLDPRESS_NOTE=$(touch {tmp_path}/run) `id` "a b" # all of it\n'
        "COLDPRESS_INTERFACE=ib7\n"
        "GLOO_SOCKET_IFNAME=eth7\n"
        "OMP_PLACES=cores\n"
        "COLDPRESS_SRUN_OPTIONS=--export=ALL,MARK=7 --quiet\n"
        "COLDPRESS_BIN=/somewhere/else"
    )
    job = desk.train(RECORD, COLDPRESS_SITE=str(site), OMP_PLACES="threads")
    assert desk.slurm.wait(job)["JobState"] == "COMPLETED", desk.log.read_text()
    [task] = records(tmp_path).values()
    expected = {
        "NCCL_DEBUG": "WARN",
        "COLDPRESS_NOTE": f'$(touch {tmp_path}/run) `id` "a b" # all of it',
        "NCCL_SOCKET_IFNAME": "ib7",
        "GLOO_SOCKET_IFNAME": "eth7",
        # The submitting shell's.
        "OMP_PLACES": "threads",
        "MARK": "7",
    }
    assert {name: task["env"][name] for name in expected} == expected
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("line", ["LD_PRELOAD=/tmp/x.so", "PATH=/tmp", "module load cuda", "COLDPRESS_BIN = /opt"])
def test_a_site_says_nothing_else(line, desk, tmp_path):
    site = tmp_path / "site.env"
    site.write_text(f"NCCL_DEBUG=WARN\n{line}\n")
    job = desk.train(RECORD, COLDPRESS_SITE=str(site))
    assert desk.slurm.wait(job)["ExitCode"] == "2:0"
    assert f"{site}:2 must be NAME=VALUE" in desk.log.read_text()
    assert not records(tmp_path)


def test_modules_without_a_module_command_are_one_sentence(desk, tmp_path):
    job = desk.train(RECORD, COLDPRESS_MODULES="cuda/13.0 gcc")
    assert desk.slurm.wait(job)["ExitCode"] == "2:0"
    assert "COLDPRESS_MODULES=cuda/13.0 gcc, and the shell of this job has no module command." in desk.log.read_text()


def test_a_port_that_is_taken_is_left_to_who_has_it(desk, tmp_path):
    job = desk.train(RECORD, "--hold")
    port = 20000 + int(job) % 10000
    with socket.create_server(("0.0.0.0", port)):
        desk.slurm.run("scontrol", "release", job)
        assert desk.slurm.wait(job)["JobState"] == "COMPLETED", desk.log.read_text()
    [task] = records(tmp_path).values()
    assert task["env"]["MASTER_PORT"] == str(port + 1)
    assert f"somebody listens on port {port}" in desk.log.read_text()


@pytest.mark.parametrize("healthy", [True, False])
def test_nodes_are_looked_at_first_where_a_site_wants_it(healthy, desk):
    body = f"echo $*\n[[ $1 != doctor ]] || exit {0 if healthy else 1}"
    job = desk.train(body, COLDPRESS_CHECKUP="true")
    ended = desk.slurm.wait(job)
    said = desk.log.read_text()
    assert f"doctor run=a runs={desk.directory}/runs quick=true" in said
    assert ended["ExitCode"] == ("0:0" if healthy else "1:0"), said
    assert ("train run=a" in said) is healthy
    assert ("not started: see above" in said) is not healthy


def test_a_node_that_fails_its_check_up_is_left_to_others(desk):
    if len(desk.slurm.nodes) < 2:
        pytest.skip("one node")
    unfit = '[[ $1 == doctor && $SLURMD_NODENAME == n1 ]] && echo "nodes to leave out: n1" && exit 1'
    body = f'{unfit}\necho "$1 on $SLURMD_NODENAME"'
    job = desk.train(body, COLDPRESS_CHECKUP="true")
    ended = desk.slurm.wait(job, "COMPLETED", "FAILED")
    said = desk.log.read_text()
    assert (ended["JobState"], ended["Restarts"], ended["NodeList"]) == ("COMPLETED", "1", "n2"), said
    assert ended["ExcNodeList"] == "n1"
    assert "back into the queue, to be run without n1" in said
    assert "train on n2" in said
    assert not os.listdir(desk.directory / "runs" / ".lives")


def test_a_job_that_finds_only_unfit_nodes_is_given_up(desk):
    job = desk.train('echo "nodes to leave out: n9"; exit 1', COLDPRESS_CHECKUP="true")
    ended = desk.slurm.wait(job, "COMPLETED", "FAILED")
    assert (ended["ExitCode"], ended["Restarts"]) == ("1:0", "2"), desk.log.read_text()
    assert desk.log.read_text().count("back into the queue, to be run without n9") == 2
    assert not os.listdir(desk.directory / "runs" / ".lives")


def test_a_sweep_is_an_array_with_a_line_for_each_run(desk, tmp_path):
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("run=a rate.base=1\nrun=b 'note=two words $(id) \"q\"'\n")
    record = RECORD.replace("SLURM_PROCID", "SLURM_ARRAY_TASK_ID")
    options = ["--array=1-3", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
    job = desk.submit(record, "seed=7", options=options, COLDPRESS_SWEEP=str(sweep))
    for task, state in (("1", "COMPLETED"), ("2", "COMPLETED"), ("3", "FAILED")):
        assert desk.slurm.wait(f"{job}_{task}")["JobState"] == state, desk.log.read_text()
    found = records(tmp_path)
    assert found["coldpress-1"]["argv"] == ["train", "seed=7", "run=a", "rate.base=1"]
    assert found["coldpress-2"]["argv"] == ["train", "seed=7", "run=b", 'note=two words $(id) "q"']
    assert len({task["env"]["MASTER_PORT"] for task in found.values()}) == 2
    assert f"{sweep} has no line 3" in desk.log.read_text()


def test_where_jobs_are_not_requeued_a_chain_goes_on(desk):
    # The first life saves and leaves, the second finishes.
    body = f"[[ -e $RUN/checkpoints/latest ]] && echo finished && exit 0\n{ADVANCE}exit 75"
    options = ["--no-requeue", "--dependency=singleton", "--job-name=chain"]
    jobs = [desk.train(body, *options) for _ in range(2)]
    assert [desk.slurm.wait(job)["ExitCode"] for job in jobs] == ["75:0", "0:0"]
    said = desk.log.read_text()
    assert "Slurm does not requeue this job: submit it again" in said
    assert said.count("finished") == 1
