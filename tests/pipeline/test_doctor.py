"""What the doctor finds before a run is started, on one process and on two, and what it makes of it."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline import distributed
from pipeline.checkups import disk, machine, trial
from pipeline.checkups.finding import Finding, Verdict, fail, ok, table, unfit_nodes, warn, worst
from pipeline.compose import load
from pipeline.distributed import World
from pipeline.doctor import run

ALONE = World(0, 0, 1, torch.device("cpu"))
SMALL = ["model.name=vit_tiny_patch16_224", "model.image_size=32", "model.patch_size=8", "model.embed_dim=48"]
SMALL += ["model.depth=2", "model.num_heads=3", "method.hidden_dim=64", "method.out_dim=32", "batch_size=8"]


def words(shards: Path, runs: Path, *more: str) -> list[str]:
    return [f"data.shards={shards}", f"runs={runs}", "samples=20", *SMALL, *more]


def verdicts(said: str) -> dict[str, str]:
    """Return the last verdict of each check that was printed."""
    return {check: verdict for verdict, check in re.findall(r"^(ok|warn|fail) +(.+?)  ", said, re.MULTILINE)}


def test_the_machine_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(load("doctor", [f"runs={tmp_path}"])) == 0
    found = verdicts(capsys.readouterr().out)
    assert list(found) == ["packages", "GPU", "cores", "memory", "clock", "network", "run directory"]
    assert "fail" not in found.values()
    assert not list(tmp_path.iterdir())


def test_a_run_in_small_has_every_shape_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], drawn_shards: Path, tmp_path: Path
) -> None:
    stages = "compression.stages=[{until:0.5,dropout:0.5}]"
    config = load("doctor", words(drawn_shards, tmp_path, "compression=staged", stages, "engine.precision=fp32"))
    assert run(config) == 0
    said = capsys.readouterr().out
    assert list(verdicts(said))[-4:] == ["shards", "images", "steps", "checkpoint"]
    # By hand: 16 patches and the class token, of the query and of the key; the query's half.
    assert "26 tokens a sample, 0 frozen layers" in said
    assert "34 tokens a sample, 0 frozen layers" in said
    assert not list(tmp_path.iterdir())


def test_two_processes_look_together(drawn_shards: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "pipeline.cli", "doctor", *words(drawn_shards, tmp_path, "freeze=freezeout", "freeze.t0=0.5")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = verdicts(done.stdout)
    assert found["network"] == "ok"
    assert "all-reduce at" in done.stdout
    assert found["checkpoint"] == "ok"
    assert "34 tokens a sample, 2 frozen layers" in done.stdout
    assert not list(tmp_path.iterdir())


def test_damaged_shards_fail_before_anything_is_trained(
    capsys: pytest.CaptureFixture[str], drawn_shards: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(drawn_shards, shards)
    for tar in shards.glob("*.tar"):
        with tar.open("r+b") as file:
            # In the first image.
            file.seek(2000)
            file.write(bytes(64))
    assert run(load("doctor", [*words(shards, tmp_path / "runs"), "samples=100000"])) == 1
    said = capsys.readouterr().out
    assert verdicts(said)["shards"] == "fail"
    assert "steps" not in verdicts(said)
    assert "coldpress verify" in said


def test_quick_reads_and_does_not_train(capsys: pytest.CaptureFixture[str], drawn_shards: Path, tmp_path: Path) -> None:
    assert run(load("doctor", [*words(drawn_shards, tmp_path), "quick=true"])) == 0
    assert list(verdicts(capsys.readouterr().out))[-1] == "shards"


def test_a_directory_that_cannot_be_written_fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "runs", Path("/proc/coldpress")):
        assert run(load("doctor", [f"runs={place}"])) == 1
        assert verdicts(capsys.readouterr().out)["run directory"] == "fail"


def test_a_step_without_memory_is_a_finding_and_the_rest_is_left() -> None:
    class Full:
        def batches(self) -> object:
            return iter([None])

        method = type("Method", (), {"tokens": staticmethod(lambda plan: 17)})

        def step(self, batch: object, plan: object) -> None:
            raise RuntimeError("CUDA out of memory. Tried to allocate\nmore lines")

    distributed.start()
    plans = [type("Plan", (), {"frozen_layers": 0})()] * 2
    [finding] = list(trial.steps(Full(), Full(), plans))  # type: ignore[arg-type]
    assert finding.verdict is Verdict.fail
    assert finding.found == "17 tokens a sample, 0 frozen layers: CUDA out of memory. Tried to allocate"
    assert "batch_size" in finding.remedy


@pytest.mark.parametrize(("gibibytes", "verdict"), [(64, Verdict.ok), (15, Verdict.warn)])
def test_little_memory_is_a_warning(gibibytes: int, verdict: Verdict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: gibibytes * machine.GIBIBYTE)
    assert machine.memory(processes_here=4).verdict is verdict


def test_the_limit_of_a_job_counts_and_those_around_it(tmp_path: Path) -> None:
    for name, limit, used in (
        ("slurm", "9000", "2000"),
        ("slurm/job", "max", "1500"),
        ("slurm/job/step", "5000", "1000"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "memory.max").write_text(f"{limit}\n")
        (tmp_path / name / "memory.current").write_text(f"{used}\n")
    assert sorted(machine._left_in_cgroups(tmp_path, "0::/slurm/job/step\n")) == [4000, 7000]
    assert not list(machine._left_in_cgroups(tmp_path, "4:memory:/slurm\n"))


def test_a_driver_without_a_gpu_for_pytorch_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert machine.gpu(ALONE).verdict is Verdict.fail


def test_a_clock_that_is_off_is_a_warning(run_ranks: Callable[..., list[str]]) -> None:
    code = """
        import time
        from pipeline import distributed
        from pipeline.checkups import machine
        world = distributed.start()
        real = time.time
        time.time = lambda: real() + 60 * (world.rank == 2)
        print(machine.clock(world).verdict.name, machine.clock(world).found)
        """
    said = run_ranks(code, 3)
    assert [line.split()[0] for line in said] == ["ok", "ok", "warn"]
    assert "+60.0 s" in said[2]


def test_a_directory_of_one_node_only_is_seen_under_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "file_system", lambda directory: "tmpfs")
    assert disk.run_directory(tmp_path, ALONE).verdict is Verdict.ok
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert disk.run_directory(tmp_path, ALONE).verdict is Verdict.warn


def test_the_file_system_is_that_of_the_deepest_mount() -> None:
    assert disk.file_system(Path("/proc/self")) == "proc"
    assert disk.file_system(Path("/dev/shm")) == "tmpfs"


def test_the_worst_of_all_processes_is_named_with_its_node() -> None:
    fine, bad, worse = ok("a", "fine"), warn("a", "slow", "buy"), fail("a", "gone", "plug in")
    found = worst([[fine, fine], [bad, fine], [worse, fine], [worse, fine]], ["n1", "n1", "n2", "n2"])
    assert found == [Finding("a", Verdict.fail, "process 2 on n2 and 1 more: gone", "plug in"), fine]
    assert worst([[bad]], ["n1"]) == [bad]
    assert unfit_nodes([[fine, fine], [bad, fine], [worse, fine], [worse, fine]], ["n1", "n1", "n2", "n2"]) == ["n2"]
    assert table(found).splitlines() == [
        "fail  a  process 2 on n2 and 1 more: gone",
        "         -> plug in",
        "ok    a  fine",
    ]


def test_what_fails_everywhere_is_no_nodes_fault_but_a_gpu_is() -> None:
    shards, gpu = fail("shards", "gone", "look"), fail("GPU", "not seen", "look")
    assert unfit_nodes([[shards], [shards]], ["n1", "n2"]) == []
    # One process of a node is enough.
    assert unfit_nodes([[shards], [ok("shards", "fine")], [shards]], ["n1", "n1", "n2"]) == []
    assert unfit_nodes([[gpu]], ["n1"]) == ["n1"]
    assert unfit_nodes([[ok("GPU", "fine")], [gpu]], ["n1", "n2"]) == ["n2"]
