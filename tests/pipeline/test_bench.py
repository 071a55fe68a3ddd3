"""The benchmark runs and promises what the cost formula says; speed itself is not tested."""

import json
from pathlib import Path

import pytest

from pipeline.bench import BENCHMARKS, run
from pipeline.compose import load

SMALL = ["model.name=vit_tiny_patch16_224", "model.image_size=32", "model.patch_size=8", "model.depth=2"]
SMALL += ["method.hidden_dim=32", "method.out_dim=16", "engine.precision=fp32", "batch_size=4", "rounds=1"]


def measure(tmp_path: Path, *overrides: str) -> list[dict[str, float]]:
    output = tmp_path / "bench.json"
    run(load("bench", [*SMALL, f"output={output}", *overrides]))
    rows: list[dict[str, float]] = json.loads(output.read_text())["rows"]
    return rows


def test_cells_against_the_uncompressed_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = measure(tmp_path, "what=step", "patch_sizes=[8,16]")
    assert [r["promised"] for r in rows] == pytest.approx([1.0, 68 / (3 * 9 + 17), 68 / 20, 68 / (3 * 3 + 5)])
    assert "realized" in capsys.readouterr().out


def test_frozen_layers_against_a_twin(tmp_path: Path) -> None:
    rows = measure(tmp_path, "what=freezing")
    assert [r["promised"] for r in rows] == pytest.approx([1.0, 1.0, 4 / 3, 2.0])
    assert all(r["milliseconds"] > 0 for r in rows)


def test_an_unknown_benchmark_is_refused_with_the_names_of_all() -> None:
    with pytest.raises(ValueError, match=f"what must be one of {', '.join(BENCHMARKS)}, got zebra"):
        run(load("bench", [*SMALL, "what=zebra"]))


def test_no_directory_for_the_output_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="output: no directory for"):
        run(load("bench", [*SMALL, f"output={tmp_path}/no/bench.json"]))
