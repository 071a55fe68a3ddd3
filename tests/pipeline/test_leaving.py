"""The real command is asked to leave at any moment, hangs or fails, and leaves as it should."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint_files import find_damage
from pipeline.pieces import Reader
from pipeline.preemption import EXIT_HUNG

REPOSITORY = Path(__file__).parents[2]
STEPS = 14
TINY = [
    "batch_size=16",
    f"budget.value={STEPS}",
    "log_every=1",
    "model.name=vit_tiny_patch16_224",
    "model.image_size=32",
    "model.patch_size=8",
    "model.embed_dim=48",
    "model.depth=3",
    "model.num_heads=3",
    "model.reference_length=17",
    "method.hidden_dim=64",
    "method.out_dim=32",
    "rate.base=1e-2",
    "freeze=freezeout",
    "freeze.t0=0.3",
    "freeze.curve=linear",
    "engine.precision=fp32",
    "checkpoint.every_steps=2",
    "probe.share=0.99",
    "probe.support=20",
    "probe.queries=10",
    "probe.k=3",
    "data.threads=1",
]
# The command, with something that happens once in its process: the n-th time that a function is called.
PROGRAM = """
import importlib, os, signal, sys, time

def happen(module, owner, name, count, action):
    owner = getattr(importlib.import_module(module), owner)
    before, calls = getattr(owner, name), []

    def changed(*words, **named):
        calls.append(name)
        if len(calls) == count:
            exec(action)
        return before(*words, **named)

    setattr(owner, name, changed)

if len(sys.argv) > 1 and sys.argv[1] != "nothing" and os.environ["RANK"] == sys.argv[1]:
    happen(*sys.argv[2:5], int(sys.argv[5]), sys.argv[6])
from pipeline.cli import main
main(sys.argv[7:])
"""
TERM = "os.kill(os.getpid(), signal.SIGTERM)"
SIGNALS = "[os.kill(os.getpid(), s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGTERM)]"
# From a thread beside the main one, which would take whatever has come in the meantime by its number.
FROM_BESIDE = "[os.kill(os.getpid(), s) for s in (signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM)]"
NOTHING = ("nothing", "", "", "", "0", "")

Command = Callable[..., list[subprocess.Popen[str]]]


@pytest.fixture
def command(tmp_path: Path, drawn_shards: Path) -> Iterator[Command]:
    started: list[subprocess.Popen[str]] = []
    (tmp_path / "program.py").write_text(PROGRAM)

    def start(run: str, *words: str, event: tuple[str, ...] = NOTHING, ranks: int = 1, of: int = 0) -> object:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        where = ["train", f"run={run}", f"runs={tmp_path}", f"data.shards={drawn_shards}", *TINY, *words]
        processes = [
            subprocess.Popen(
                [sys.executable, str(tmp_path / "program.py"), *event, *where],
                env=inherited
                | {"OMP_NUM_THREADS": "1", "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(of or ranks)}
                | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(REPOSITORY)},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for r in range(ranks)
        ]
        started.extend(processes)
        return processes

    yield start  # type: ignore[misc]
    for process in started:
        process.kill()
        process.communicate()


def end(processes: list[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    outputs = ["\n".join(process.communicate(timeout=120)) for process in processes]
    return [process.returncode for process in processes], outputs


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint: weights, momentum encoder, optimizer."""
    reader = Reader(path)
    return {name: reader.whole(name) for name in reader.names}


# In the order of the steps at which they come.
MOMENTS = {
    "data set-up": ("data.loader", "Loader", "__init__", "1", TERM),
    "save": ("pipeline.pieces", "HostCopies", "copy", "1", SIGNALS),
    "publishing": ("pipeline.checkpoint", "Checkpointer", "_publish", "1", FROM_BESIDE),
    "freeze": ("pipeline.engine", "Engine", "_start", "2", TERM),
    "probe": ("pipeline.probes.knn", "KNNProbe", "run", "1", TERM),
}


def test_asked_at_any_moment_a_run_saves_and_ends_as_if_nothing_had_been(command: Command, tmp_path: Path) -> None:
    assert end(command("whole"))[0] == [0]
    last = f"step_{STEPS:08d}"
    before = ""
    for moment, event in MOMENTS.items():
        codes, said = end(command("parts", event=("0", *event)))
        assert codes == [75], (moment, said)
        assert "stopped, saved at step" in said[0], moment
        assert not before or f"resumed at step {int(before[-8:])}" in said[0], moment
        saved = sorted((tmp_path / "parts" / "checkpoints").glob("step_*"))
        assert before < saved[-1].name < last, moment
        assert [find_damage(each) for each in saved] == [None] * len(saved), moment
        before = saved[-1].name
    assert end(command("parts"))[0] == [0]
    whole, parts = (tensors(tmp_path / run / "checkpoints" / last) for run in ("whole", "parts"))
    assert any("exp_avg" in name for name in whole)
    assert parts.keys() == whole.keys()
    assert not [name for name in whole if not torch.equal(whole[name], parts[name])]


def test_a_process_that_sleeps_in_forward_is_named_by_both(command: Command, tmp_path: Path) -> None:
    sleep = ("1", "pipeline.methods.moco", "MoCo", "forward", "6", "time.sleep(1000)")
    codes, said = end(command("run", "watchdog.step_seconds=3", "watchdog.step_factor=1", event=sleep, ranks=2))
    assert codes == [EXIT_HUNG, EXIT_HUNG], said
    for rank in (0, 1):
        assert "process 1 (pid" in said[rank]
        assert "hangs in forward after step 5 for" in said[rank]
        assert "exec(action)" not in said[rank]
        stacks = (tmp_path / "run" / "heartbeats" / f"stacks_{rank:05d}.txt").read_text()
        assert "engine.py" in stacks
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000004"


def test_what_goes_wrong_on_one_process_is_said_once(command: Command) -> None:
    fail = ("1", "pipeline.methods.moco", "MoCo", "forward", "6", "raise KeyError('the dog ate it')")
    codes, said = end(command("run", event=fail, ranks=2))
    assert codes == [1, 1], said
    assert "\n".join(said).count("the dog ate it") == 1
    assert "the dog ate it" in said[1]
    assert "Traceback" not in said[0]


def test_a_refusal_that_only_the_second_process_knows_is_said_once(command: Command, tmp_path: Path) -> None:
    refuse = ("1", "data.loader", "Loader", "__init__", "1", "raise ValueError('data.shards: no directory here')")
    codes, said = end(command("run", event=refuse, ranks=2))
    assert codes == [2, 2], said
    assert said[1].strip() == "coldpress: data.shards: no directory here"
    assert said[0].strip() == ""
    assert not (tmp_path / "run").exists()


def catches(process: subprocess.Popen[str], number: signal.Signals) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1]
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_before_anything_is_loaded_ends_the_process_quietly(number: signal.Signals, command: Command) -> None:
    (process,) = command("run")
    deadline = time.monotonic() + 30
    while not catches(process, number):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
    process.send_signal(number)
    began = time.monotonic()
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (75, "", "")
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_while_the_others_are_waited_for_ends_the_process(
    number: signal.Signals, code: int, command: Command
) -> None:
    (process,) = command("run", of=2)
    await_listening(process)
    process.send_signal(number)
    began = time.monotonic()
    out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert time.monotonic() - began < 5
    assert (out + err) == "" or number == signal.SIGINT


def await_listening(process: subprocess.Popen[str]) -> None:
    """Wait until the process has opened the store in which the others would meet it."""
    deadline = time.monotonic() + 90
    while True:
        sockets = open_files(process.pid)
        rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
        if any(row[3] == "0A" and f"socket:[{row[9]}]" in sockets for row in rows[1:]):
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)


def open_files(pid: int) -> set[str]:
    """Return what a process has open, but for what it closes while we look."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(link))
    return found


def test_operators_see_all_stacks_while_the_process_goes_on(command: Command) -> None:
    (process,) = command("run", of=2)
    await_listening(process)
    process.send_signal(signal.SIGQUIT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "(most recent call first)" in err
    assert "init_process_group" in err
    assert "signals" in err or err.count("Thread 0x") >= 1
