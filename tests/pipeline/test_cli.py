"""Exit codes and what a user sees."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cli import COMMANDS, dispatch
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


@pytest.mark.parametrize("words", [["--help"], ["shard", "--help"], ["verify", "shards=/nowhere"], ["trian"]])
def test_what_needs_no_torch_does_not_wait_for_it(words: list[str]) -> None:
    program = (
        "import sys; from pipeline.cli import dispatch; dispatch(sys.argv[1:]); "
        "sys.exit(str(sorted({'torch', 'deepspeed', 'timm', 'nvidia'} & sys.modules.keys())))"
    )
    result = subprocess.run([sys.executable, "-c", program, *words], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.stderr.splitlines()[-1] == "[]"
