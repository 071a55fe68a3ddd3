"""What the documents promise exists."""

import re
from pathlib import Path

import pytest

from pipeline.cli import COMMANDS
from pipeline.compose import ROOTS, load

REPOSITORY = Path(__file__).parents[1]
DOCUMENTS = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("*/README.md"), *REPOSITORY.glob("docs/*.md")]
REQUIRED = {
    "train": ["run=x", "budget.value=1"],
    "plan": ["run=x", "budget.value=1"],
    "evaluate": ["run=x"],
    "export": ["run=x"],
    "analyze": ["run=x"],
}


def text(path: Path) -> str:
    return path.read_text()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", text(path)):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_commands_compose(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What an earlier command of the page leaves, and a later one reads.
    schedule = tmp_path / "runs" / "whole" / "analysis" / "schedule.yaml"
    schedule.parent.mkdir(parents=True)
    schedule.write_text("stages: [{until: 0.5, patch_size: 30}]")
    monkeypatch.chdir(tmp_path)
    for line in re.findall(r"^ +coldpress (.+)$", text(path), re.M):
        command, *words = line.split("#")[0].split()
        assert command in COMMANDS
        words = [w.replace("experiment=NAME", "experiment=demo") for w in words]
        load(command, [*REQUIRED.get(command, []), *words])


def test_keys_named_in_the_readme_are_keys() -> None:
    groups = ("model", "method", "compression", "freeze", "budget", "engine", "monitor", "data")
    for key in re.findall(rf"`?\b((?:{'|'.join(groups)})\.[a-z_0-9]+)=", text(REPOSITORY / "README.md")):
        options = {
            "compression.patch_size": "constant",
            "compression.dropout": "constant",
            "compression.stages": "staged",
            "compression.file": "staged",
        }
        chosen = [f"compression={options[key]}"] if key in options else ["freeze=freezeout"]
        config = load("train", ["run=x", "budget.value=1", *chosen, *STAGES.get(chosen[0], [])])
        for part in key.split("."):
            assert hasattr(config, part), key
            config = getattr(config, part)


def test_compressions_named_in_the_readme_fit_the_usual_images() -> None:
    (row,) = re.findall(r"^\| compression \|.*$", text(REPOSITORY / "README.md"), re.M)
    constant, stages = re.findall(r"`(compression\.[^`]*)`", row)
    given = ["run=x", "budget.value=1"]
    assert load("train", [*given, "compression=constant", *constant.split()]).compression.patch_size == 28
    assert load("train", [*given, "compression=staged", stages]).compression.stages[0].patch_size == 28
    with pytest.raises(ValueError, match="must list at least one stage") as refusal:
        load("train", [*given, "compression=staged"])
    (remedy,) = re.findall(r"say for instance (\S+), or", str(refusal.value))
    assert load("train", [*given, "compression=staged", remedy]).compression.stages


STAGES = {"compression=staged": ["compression.stages=[{until:0.5}]"]}


def test_make_targets_named_in_the_readme_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", text(REPOSITORY / "Makefile"), re.M)
    assert set(re.findall(r"make ([a-z-]+)", text(REPOSITORY / "README.md"))) <= set(targets)


def test_every_command_is_in_the_architecture() -> None:
    assert all(f"{name.replace('-', '_')}.py" in text(REPOSITORY / "ARCHITECTURE.md") for name in ROOTS)
