"""Exit codes and what a user sees."""

import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.cli import COMMANDS, dispatch, main
from pipeline.compose import ROOTS

REPOSITORY = Path(__file__).parents[2]


def test_every_command_has_a_config_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMANDS.keys() == ROOTS.keys()
    for command in COMMANDS:
        assert dispatch([command, "--help"]) == 0
        said = capsys.readouterr().out
        assert said.startswith(f"usage: coldpress {command}")
        assert COMMANDS[command][1] in said


@pytest.mark.parametrize("words", [[], ["--help"], ["help"]])
def test_usage_lists_commands(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(words) == 0
    said = capsys.readouterr().out
    assert all(command in said for command in COMMANDS)


def test_help_shows_the_keys_of_a_choice(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["train", "compression=constant", "freeze=freezeout", "--help"]) == 0
    said = capsys.readouterr().out
    assert "dropout: 0.0" in said
    assert "t0: 0.8" in said


def test_cfg_prints_the_composed_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["train", "--cfg", "experiment=demo", "seed=7"]) == 0
    said = capsys.readouterr().out
    assert "seed: 7" in said
    assert "embed_dim: 96" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], "trian is not a command; choose from shard, verify"),
        (["train", "run=x", "budget.value=1", "zebra=1"], "zebra is not a key of coldpress train"),
        (["shard", "source=/nowhere/at/all", "output=/tmp/x"], "/nowhere/at/all"),
        (["verify", "shards=/nowhere/at/all"], "/nowhere/at/all"),
        (["evaluate", "run=x", "runs=/nowhere"], "no run in /nowhere/x; give run=NAME"),
        (["plan", "experiment=demo", "run=x", "data.shards=/nowhere"], "/nowhere"),
    ],
)
def test_refusals_have_code_2_and_one_line(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(words) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.startswith("coldpress: ")
    assert said.count("\n") == 1


def test_of_many_tasks_the_first_refuses_but_each_that_shards(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert dispatch(["shard", "source=/nowhere/at/all", "output=/tmp/x"]) == 2
    assert "/nowhere/at/all" in capsys.readouterr().err
    assert dispatch(["train", "zebra=1"]) == 2
    assert capsys.readouterr().err == ""


def test_damage_found_by_verify_has_code_1(drawn_shards: Path, tmp_path: Path) -> None:
    for path in drawn_shards.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    victim = tmp_path / "train-000001.tar"
    content = bytearray(victim.read_bytes())
    content[5000] ^= 1
    victim.write_bytes(content)
    command = [sys.executable, "-m", "pipeline.cli", "verify", f"shards={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 1
    assert "train-000001.tar" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "/data/shards")

    monkeypatch.setattr("data.verify.run", full)
    assert dispatch(["verify", "shards=/data/shards"]) == 1
    assert capsys.readouterr().err == (
        "coldpress: /data/shards: No space left on device; free some space or write elsewhere.\n"
    )


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.EACCES, "change its permissions, or name another place"), (errno.EIO, "check the disk, or copy it")],
)
def test_a_file_that_cannot_be_read_is_not_told_to_free_space(
    number: int, remedy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number), "p.tar")

    monkeypatch.setattr("data.verify.run", refuse)
    assert dispatch(["verify", "shards=shards"]) == 1
    assert capsys.readouterr().err.startswith(f"coldpress: p.tar: {os.strerror(number)}; {remedy}")


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_runs_that_are_no_directory_are_one_sentence(
    below: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert dispatch(["plan", "run=x", "budget.value=1", "model.depth=1", f"runs={tmp_path}/file{below}"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"coldpress: {tmp_path}/file")
    assert said.endswith("; name another place.\n")


AT_WORK = """
import os, sys, time
from pathlib import Path

def forever(task):
    Path(os.environ["AT_WORK"]).touch()
    time.sleep(600)

if __name__ == "__main__":
    import slow
    import data.shard, data.verify
    data.shard.keep_or_pack = data.verify.check_shard = slow.forever
    from pipeline.cli import main
    main()
"""


@pytest.mark.parametrize("between", [0.0, 0.02, 0.3])
@pytest.mark.parametrize("command", ["shard", "verify"])
def test_ctrl_c_once_or_twice_leaves_at_once(
    command: str, between: float, drawn_folder: Path, drawn_shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(AT_WORK)
    words = (
        [f"source={drawn_folder}", f"output={tmp_path / 'out'}"] if command == "shard" else [f"shards={drawn_shards}"]
    )
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{tmp_path}", "AT_WORK": str(tmp_path / "at_work")}
    started = [sys.executable, tmp_path / "slow.py", command, *words, "workers=2"]
    process = subprocess.Popen(started, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while not (tmp_path / "at_work").exists():
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(between)
        if between and process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert [line for line in said.splitlines() if "it/s" not in line] == [
        "coldpress: interrupted; the same command goes on from here."
        if command == "shard"
        else "coldpress: interrupted."
    ]


def test_ctrl_c_while_python_imports_is_one_sentence() -> None:
    program = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, *_):
        if name == "numpy":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
from pipeline.cli import main
main(["verify", "shards=x"])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "coldpress: interrupted.\n")


@pytest.mark.parametrize("words", [["--help"], ["verify", "--help"], ["verify", "shards"]])
def test_nobody_listening_is_no_error(words: list[str], drawn_shards: Path) -> None:
    words = [word.replace("shards", f"shards={drawn_shards}") for word in words]
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "pipeline.cli", *words]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.returncode == 141
    assert "Error" not in done.stderr


def test_a_broken_pipe_of_another_kind_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose_a_socket(*_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("data.verify.run", lose_a_socket)
    monkeypatch.setattr("pipeline.cli.LEAVES_AT_ONCE", set())  # pytest wants Ctrl-C for itself
    with pytest.raises(BrokenPipeError):
        main(["verify", "shards=shards"])


@pytest.mark.parametrize("words", [["--help"], ["shard", "--help"], ["verify", "shards=/nowhere"], ["trian"]])
def test_what_needs_no_torch_does_not_wait_for_it(words: list[str]) -> None:
    program = (
        "import sys; from pipeline.cli import dispatch; dispatch(sys.argv[1:]); "
        "sys.exit(str(sorted({'torch', 'deepspeed', 'timm', 'nvidia'} & sys.modules.keys())))"
    )
    result = subprocess.run([sys.executable, "-c", program, *words], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.stderr.splitlines()[-1] == "[]"
