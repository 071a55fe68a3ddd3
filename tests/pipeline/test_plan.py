"""Stages of a run and what a budget buys."""

from pathlib import Path

import pytest

from pipeline.compose import load
from pipeline.config import TrainConfig
from pipeline.methods import Method, build_method
from pipeline.models.vit import ViT
from pipeline.plan import StageRow, run, stages, uncompressed_cost
from pipeline.train import build_schedules


def plan(*overrides: str) -> tuple[TrainConfig, Method, list[StageRow]]:
    config = load("train", ["run=p", "batch_size=512", "method.hidden_dim=64", "model.depth=2", *overrides])
    method = build_method(config.method, ViT(config.model, 0))
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
