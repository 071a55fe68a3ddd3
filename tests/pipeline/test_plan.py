"""Stages of a run and what a budget buys."""

from pathlib import Path

import pytest

from pipeline.compose import load
from pipeline.config import TrainConfig
from pipeline.methods import Method
from pipeline.parts import build_schedules
from pipeline.plan import StageRow, imagine, run, stages, uncompressed_cost


def plan(*overrides: str) -> tuple[TrainConfig, Method, list[StageRow]]:
    config = load("train", ["run=p", "batch_size=512", "model.depth=2", *overrides])
    method = imagine(config)
    return config, method, stages(config, build_schedules(config, method), method)


@pytest.mark.parametrize(
    ("overrides", "steps"),
    # ImageNet-100 at batch 512, iterations that a budget buys at a cost per sample of 4, 1.761 and 4.589.
    [
        ([], {25: 12.2, 100: 48.8, 200: 97.7, 520: 254}),
        (["compression=constant", "compression.dropout=0.75"], {25: 27.7, 100: 110.9, 150: 166}),
        (["model.image_size=240"], {25: 10.6, 100: 42.6, 520: 221}),
    ],
)
def test_a_cost_budget_buys_the_papers_iterations(overrides: list[str], steps: dict[int, float]) -> None:
    for millions, thousands in steps.items():
        _, _, rows = plan(*overrides, f"budget.value={millions}e6", "budget.unit=cost")
        assert sum(r.samples for r in rows) / 512e3 == pytest.approx(thousands, rel=0.005)


def test_stages_cover_the_budget_and_count_the_frozen_prefix() -> None:
    config, method, rows = plan(
        "budget.value=1000",
        "budget.unit=cost",
        "compression=staged",
        "compression.stages=[{until:0.5,patch_size:28,dropout:0.5}]",
        "freeze=freezeout",
        "rate.warmup=0.0",
        "freeze.curve=linear",
        "freeze.t0=0.4",
    )
    assert [(round(r.begin, 3), round(r.end, 3), r.plan.frozen_layers) for r in rows] == [
        (0, 0.4, 0),
        (0.4, 0.5, 1),
        (0.5, 0.7, 1),
        (0.7, 1.0, 2),
    ]
    assert sum(r.samples * r.cost for r in rows) == pytest.approx(1000)
    assert rows[0].cost == pytest.approx((3 * 33 + 65) / 197)
    assert rows[3].cost == pytest.approx((2 * 197 + 197) / 197)
    assert uncompressed_cost(build_schedules(config, method), method) == pytest.approx(4)


def test_plan_prints_and_draws(tmp_path: Path, drawn_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["experiment=demo", "run=p", f"runs={tmp_path}", f"data.shards={drawn_shards}"]
    run(load("plan", overrides))
    said = capsys.readouterr().out
    assert "epochs of 48" in said
    assert "uncompressed:" in said
    assert (tmp_path / "p-plan.png").stat().st_size > 10_000
    assert not (tmp_path / "p").exists()


def said(capsys: pytest.CaptureFixture[str], runs: Path, *overrides: str) -> list[str]:
    run(load("plan", ["run=p", f"runs={runs}", "model.depth=2", *overrides]))
    return capsys.readouterr().out.splitlines()


ADAPTIVE = ["compression=adaptive", "model.image_size=240", "budget.value=1e6"]


def test_what_is_chosen_while_training_is_said_and_priced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header, start, choice, *_ = said(capsys, tmp_path, *ADAPTIVE, "budget.unit=cost")
    assert header.startswith("progress")
    assert start.split()[3:6] == ["24", "0.500", "51/101"]
    # Of patches of 48 with 2 of 25 kept, and of 225 patches of 16, over 197.
    costs = [(3 * 3 + 26) / 197, (3 * 226 + 226) / 197]
    assert choice.startswith("adaptive: chosen while training from 30 compressions of {:.4f} to {:.4f}".format(*costs))


def test_what_a_run_would_refuse_of_a_choice_a_plan_refuses(tmp_path: Path) -> None:
    for words, sentence in (
        (["budget.unit=steps"], "budget.unit must be cost with compression=adaptive"),
        (["budget.unit=cost", "batch_size=20"], "compression.sub_batches must cut the batch of each process evenly"),
        (["budget.unit=cost", "compression.patch_sizes=[16,28]"], "compression.patch_sizes must divide"),
        (["budget.unit=cost", "compression.start_patch_size=28"], "compression.start_patch_size must be one of"),
    ):
        with pytest.raises(ValueError, match=sentence):
            run(load("plan", ["run=p", f"runs={tmp_path}", "model.depth=2", *ADAPTIVE, *words]))


def test_a_plan_has_no_weights() -> None:
    _, method, _ = plan("budget.value=1")
    assert all(parameter.is_meta for parameter in method.parameters())


def test_totals_without_shards_are_in_epochs_hours_and_both_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = said(
        capsys,
        tmp_path,
        "batch_size=500",
        "compression=constant",
        "compression.dropout=0.75",
        "budget.unit=cost",
        # 10 million samples of (3 * 50 + 197) / 197 units; the paper's formula has 3 * 197 / 4 + 197.
        f"budget.value={10e6 * 347 / 197}",
        "epoch_size=125000",
        "cost_per_gpu_second=100",
        "gpus=4",
    )
    assert lines[3:5] == [
        "as planned:   10,000,000 samples = 20,000 steps of 500 = 80.00 epochs of 125,000",
        "cost:         17,614,213 units by real tokens, 17,500,000 by the paper's formula",
    ]
    # 17,614,213 / 100 / 3600, and a quarter of it.
    assert lines[6] == "time:         48.9 GPU hours at 100 units/s a GPU, 12.2 h on 4"


def test_what_nobody_knows_is_not_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "\n".join(said(capsys, tmp_path, "budget.value=10"))
    assert "epochs" not in text
    assert "hours" not in text


def test_a_given_epoch_counts_before_that_of_the_shards(
    tmp_path: Path, drawn_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = said(capsys, tmp_path, "budget.value=10", f"data.shards={drawn_shards}", "epoch_size=64")
    assert lines[3] == "as planned:   2,560 samples = 10 steps of 256 = 40.00 epochs of 64"


@pytest.mark.parametrize("word", ["epoch_size=-1", "cost_per_gpu_second=-1", "gpus=0"])
def test_impossible_numbers_are_refused_by_name(word: str) -> None:
    key, _, value = word.partition("=")
    with pytest.raises(ValueError, match=rf"^{key} must .*{value}"):
        load("plan", ["run=p", "budget.value=1", word])


def test_what_only_plans_know_is_no_key_of_train() -> None:
    with pytest.raises(ValueError, match="epoch_size is not a key of coldpress train"):
        load("train", ["run=p", "budget.value=1", "epoch_size=5"])
