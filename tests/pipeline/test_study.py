"""The study: its arithmetic, its refusals, and a small one of two ways for real."""

import json
import math
from pathlib import Path

import pytest

from pipeline import study
from pipeline.children import coldpress
from pipeline.compose import load
from pipeline.study import reached, run, seconds_until


def row(*accuracies: float) -> dict[str, float]:
    return {f"knn_{m:.0%}": a for m, a in zip((0.0, *study.MILESTONES), accuracies, strict=True)}


@pytest.mark.parametrize(
    ("accuracies", "share"),
    [
        # Half-way between the evaluations at 25 and 50 %.
        ((0.1, 0.2, 0.4, 0.5, 0.6), 0.375),
        ((0.1, 0.3, 0.4, 0.5, 0.6), 0.25),
        ((0.35, 0.3, 0.4, 0.5, 0.6), 0.0),
        ((0.1, 0.2, 0.2, 0.2, 0.4), 0.875),
    ],
)
def test_where_an_accuracy_is_first_reached(accuracies: tuple[float, ...], share: float) -> None:
    assert reached(row(*accuracies), 0.3) == pytest.approx(share)


def test_what_was_never_reached_is_no_number() -> None:
    assert math.isnan(reached(row(0.1, 0.2, 0.25, 0.29, 0.28), 0.3))


def test_time_is_that_of_steps_and_stops_within_a_log_interval() -> None:
    def logged(cost: float, rate: float) -> dict[str, float]:
        return {"loss": 1.0, "cost_total": cost, "budget_total": 100.0, "cost_per_second": rate}

    # 40 units at 10 a second, then 70 at 20, the last 10 of them beyond the budget; an evaluation in between.
    metrics = [logged(40, 10), {"knn": 0.5}, logged(110, 20)]
    assert seconds_until(metrics, 0.2) == pytest.approx(2.0)
    assert seconds_until(metrics, 0.5) == pytest.approx(4.5)
    assert seconds_until(metrics, 1.0) == pytest.approx(7.0)
    assert math.isnan(seconds_until(metrics, math.nan))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["budget=0"], r"budget must be above 0, got 0"),
        (["seeds=[]"], r"seeds must be one or several different numbers, got \[\]"),
        (["seeds=[1,1]"], r"seeds must be one or several different numbers, got \[1, 1\]"),
    ],
)
def test_refusals(words: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load("study", ["shards=x", *words])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["patch_sizes=[6,7]"], r"patch_sizes must divide the run's image_size=48, got 7"),
        (["dropouts=[0,0.25]"], r"compression\.start_dropout must be one of compression\.dropouts=\[0\.0, 0\.25\]"),
        (["samples=100"], r"samples must be a multiple of sub_batch"),
        (["baseline=small_localmim"], r"method=localmim takes no compression: its mask already is a token dropout"),
        (["baseline=tiny"], r"experiment=tiny is not an option; choose from .*tiny_moco"),
        (["budget=500"], r"budget must buy every run at least 2 steps, got 500: one step of none-0 costs 512"),
    ],
)
def test_what_a_later_command_would_refuse_is_refused_before_the_first(
    words: list[str], sentence: str, drawn_shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence):
        run(load("study", [f"shards={drawn_shards}", f"output={tmp_path / 'out'}", *words]))
    assert not (tmp_path / "out").exists()


def test_a_study(
    tmp_path: Path, drawn_shards: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_one_block(command: str, *words: str) -> None:
        coldpress(command, *words, *(["model.depth=1", "batch_size=16"] if command == "train" else []))

    # Time, without which nothing else changes: a small model and batch, two ways to compress, two evaluations.
    monkeypatch.setattr("pipeline.trials.coldpress", on_one_block)
    monkeypatch.setattr(study, "SCHEDULES", (study.BASELINE, study.STAGED))
    monkeypatch.setattr(study, "MILESTONES", (1.0,))
    words = [f"shards={drawn_shards}", f"val={drawn_shards}", f"output={tmp_path / 'out'}", "budget=1100", "support=0"]
    words += ["patch_sizes=[6,12]", "dropouts=[0,0.5]", "samples=32", "sub_batch=8"]
    run(load("study", words))
    assert "compression  seed" in capfd.readouterr().out
    whole, staged = json.loads((tmp_path / "out" / "study.json").read_text())["rows"]
    assert (whole["schedule"], staged["schedule"], whole["cost"]) == ("none", "staged", pytest.approx(4.0))
    assert staged["cost"] <= whole["cost"]
    assert (tmp_path / "out" / "study.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "none-0" / "analysis" / "schedule.yaml").exists()
