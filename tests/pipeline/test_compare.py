"""The comparison of compressed and uncompressed runs: its arithmetic, its refusals, and one small one for real."""

import json
import shutil
from pathlib import Path

import pytest

from data.shard import ShardConfig
from data.shard import run as shard
from pipeline.children import coldpress
from pipeline.compare import CompareConfig, run, trials
from pipeline.compose import load
from pipeline.trials import Task, caveats, check, cost_of_step, summarize


def configured(shards: Path | str, *words: str) -> CompareConfig:
    config: CompareConfig = load("compare", [f"shards={shards}", *words])
    return config


def task(config: CompareConfig) -> Task:
    return Task(config.shards, config.val, config.budget, config.support, config.output)


def row(step: int, rate: float, wait: float) -> dict[str, float]:
    totals = {"samples_total": 8.0 * step, "cost_total": 32.0 * step}
    return {"step": step, "cost_per_second": rate, "loss": 2.0 - step / 100, "data_wait_ratio": wait, **totals}


def test_time_is_the_median_of_the_intervals() -> None:
    rows = [row(10, 500, 0.2), {"step": 10, "knn_top1_ratio": 0.3}, row(20, 20, 0.4), row(25, 400, 0.1)]
    assert summarize(rows) == pytest.approx(
        {
            "steps": 25,
            "samples": 200,
            "cost": 4.0,
            "step_first": 10,
            "loss_first": 1.9,
            "loss_last": 1.75,
            "milliseconds_per_unit": 2.5,
            "data_wait": 0.2,
        }
    )


def test_runs_of_few_steps_are_named_and_first_losses_placed() -> None:
    whole = {"run": "dino-none", "steps": 29, "step_first": 10}
    compressed = {"run": "dino-constant", "steps": 30, "step_first": 10}
    placed, short = caveats([whole, compressed])
    assert "`loss from` is of the first step that is logged (10)" in placed
    assert "Fewer than 30 steps, so that figures are noise of the start (dino-none: 29)" in short
    assert len(caveats([compressed])) == 1
    assert "(5, 10)" in caveats([compressed, whole | {"steps": 5, "step_first": 5}])[0]


def test_the_runs_differ_in_compression_only() -> None:
    whole, compressed = trials(configured("x", "patch_size=12", "dropout=0.25"), "simclr")
    assert whole.words == ("compression=none",)
    assert compressed.words == ("compression=constant", "compression.patch_size=12", "compression.dropout=0.25")
    assert (whole.run, compressed.run) == ("simclr-none", "simclr-constant")


@pytest.mark.parametrize(
    # 128 samples a step; 65 tokens whole, 33 of 64 dropped to a half; DINO's two small crops have 17 each.
    ("method", "whole", "compressed"),
    [("moco", 4, (3 * 33 + 65) / 65), ("simclr", 6, 6 * 33 / 65), ("dino", 4 + 6 * 17 / 65, None)],
)
def test_the_cost_of_a_step_is_foreseen(method: str, whole: float, compressed: float | None) -> None:
    config = configured("x", "patch_size=6", "dropout=0.5")
    costs = [cost_of_step(task(config), trial) for trial in trials(config, method)]
    assert costs[0] == pytest.approx(128 * whole)
    assert costs[1] == pytest.approx(128 * (compressed or (3 * 33 + 6 * 17 + 65) / 65))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["methods=[moco,byol]"], r"methods must be some of moco, simclr, dino, got \['moco', 'byol'\]"),
        (["methods=[]"], r"methods must be some of"),
        (["budget=0"], r"budget must be above 0"),
    ],
)
def test_refusals(words: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        configured("x", *words)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["patch_size=10"],
            r"^patch_size must divide model\.image_size=48, got 10; sizes that do: 6, 8, 12, 16, 24, 48",
        ),
        (["patch_size=0"], r"^patch_size must be a number of pixels, got 0"),
        (["dropout=1.0"], r"^dropout must be in \[0, 1\), got 1\.0; 0 keeps every token"),
        (["dropout=nan"], r"^dropout must be in \[0, 1\), got nan; 0 keeps every token"),
        # One step of 128 samples of SimCLR: 6 forwards.
        (["budget=768"], r"at least 2 steps, got 768: one step of simclr-none costs 768; 120e3"),
        (["val={flat}"], r"^val: .*flat has 0 classes, .*shards has 4 or others; both must be sharded from the same"),
        (["val={three}"], r"^val: .*three has 3 classes, .*shards has 4 or others"),
        (["val={broken}"], r"broken.*\.tar: missing, but manifest\.json names it"),
        (["val=/nowhere"], r"^/nowhere: no manifest\.json"),
        (["shards={flat}"], r"^shards: .*flat has no labels, which k-NN asks for"),
    ],
)
def test_what_a_later_command_would_refuse_is_refused_before_the_first(
    words: list[str], sentence: str, drawn_shards: Path, other_shards: dict[str, Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    config = configured(drawn_shards, f"output={output}", *(word.format(**other_shards) for word in words))
    with pytest.raises(ValueError, match=sentence):
        run(config)
    assert not output.exists()


def test_what_can_be_run_passes_the_check(drawn_shards: Path) -> None:
    config = configured(drawn_shards, f"val={drawn_shards}", "budget=769")
    check(task(config), [trial for method in config.methods for trial in trials(config, method)])


@pytest.fixture(scope="module")
def other_shards(drawn_folder: Path, drawn_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return sets that do not go with `drawn_shards`: without labels, with a class less, with a tar less."""
    root = tmp_path_factory.mktemp("others")
    folders = sorted(drawn_folder.iterdir())
    shutil.copytree(folders[0], root / "images-flat")
    for folder in folders[:3]:
        shutil.copytree(folder, root / "images-three" / folder.name)
    for name in ("flat", "three"):
        shard(ShardConfig(str(root / f"images-{name}"), str(root / name), workers=1))
    next(iter(sorted(shutil.copytree(drawn_shards, root / "broken").glob("*.tar")))).unlink()
    return {name: root / name for name in ("flat", "three", "broken")}


def test_a_comparison(
    tmp_path: Path, drawn_shards: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_one_block(command: str, *words: str) -> None:
        coldpress(command, *words, *(["model.depth=1"] if command == "train" else []))

    # A sixth of the time; steps and costs, which count forwards of the whole model, stay the same.
    monkeypatch.setattr("pipeline.trials.coldpress", on_one_block)
    words = [f"output={tmp_path / 'out'}", f"val={drawn_shards}", "methods=[simclr]", "budget=1000", "support=0"]
    run(configured(drawn_shards, *words))
    table = capfd.readouterr().out
    assert "simclr: a compressed sample costs 3.42x less and takes" in table
    assert "noise of the start (simclr-none: 2; simclr-constant: 5)" in table
    whole, compressed = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert (whole["cost"], compressed["cost"]) == (pytest.approx(6.0), pytest.approx(3 * 38 / 65))
    assert (whole["steps"], compressed["steps"]) == (2, 5)
    assert compressed["realized"] == whole["milliseconds_per_unit"] / compressed["milliseconds_per_unit"]
