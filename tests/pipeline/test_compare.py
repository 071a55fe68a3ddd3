"""The comparison of compressed and uncompressed runs: its arithmetic, its refusals, and one small one for real."""

import json
from pathlib import Path

import pytest

from pipeline.compare import cases, run, summarize
from pipeline.compose import load


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
            "loss_first": 1.9,
            "loss_last": 1.75,
            "milliseconds_per_unit": 2.5,
            "data_wait": 0.2,
        }
    )


def test_the_cases_differ_in_compression_only() -> None:
    whole, compressed = cases(load("compare", ["shards=x", "patch_size=12", "dropout=0.25"]), "simclr")
    assert whole.words == ("compression=none",)
    assert compressed.words == ("compression=constant", "compression.patch_size=12", "compression.dropout=0.25")
    for case in (whole, compressed):
        load("train", ["run=x", "experiment=small_simclr", "data.shards=x", *case.words])


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
        load("compare", ["shards=x", *words])


def test_a_comparison(tmp_path: Path, drawn_shards: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [f"shards={drawn_shards}", f"output={tmp_path / 'out'}", "methods=[simclr]", "budget=2000", "support=0"]
    run(load("compare", words))
    table = capfd.readouterr().out
    assert "simclr: a compressed sample costs 3.42x less and takes" in table
    whole, compressed = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert (whole["cost"], compressed["cost"]) == (pytest.approx(6.0), pytest.approx(3 * 38 / 65))
    assert (whole["steps"], compressed["steps"]) == (2, 5)
    assert compressed["realized"] == whole["milliseconds_per_unit"] / compressed["milliseconds_per_unit"]
