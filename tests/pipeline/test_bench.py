"""The benchmark runs and promises what the cost formula says; speed itself is not tested."""

import json
from pathlib import Path

import pytest

from pipeline.bench import run
from pipeline.config import load

SMALL = ["model.name=vit_tiny_patch16_224", "model.image_size=32", "model.patch_size=8", "model.depth=2"]
SMALL += ["method.hidden_dim=32", "method.out_dim=16", "engine.precision=fp32", "batch_size=4", "rounds=1"]


def measure(tmp_path: Path, *overrides: str) -> list[dict[str, float]]:
    output = tmp_path / "bench.json"
    run(load("bench", [*SMALL, f"output={output}", *overrides]))
    rows: list[dict[str, float]] = json.loads(output.read_text())
    return rows


def test_cells_against_the_uncompressed_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = measure(tmp_path, "what=step", "patch_sizes=[8,16]")
    assert [r["promised"] for r in rows] == pytest.approx([1.0, 68 / (3 * 9 + 17), 68 / 20, 68 / (3 * 3 + 5)])
    assert "realized" in capsys.readouterr().out


def test_frozen_layers_against_a_twin(tmp_path: Path) -> None:
    rows = measure(tmp_path, "what=freezing")
    assert [r["promised"] for r in rows] == pytest.approx([1.0, 1.0, 4 / 3, 2.0])
    assert all(r["milliseconds"] > 0 for r in rows)
