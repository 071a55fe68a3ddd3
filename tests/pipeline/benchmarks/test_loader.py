"""What the loader's benchmark reports and refuses; speed itself is not tested."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.bench import run
from pipeline.benchmarks import loader as loader_benchmark
from pipeline.benchmarks import timing
from pipeline.benchmarks.loader import COLORS, FEED, METHODS, OURS, bench_loader
from pipeline.benchmarks.peers.webdataset_torchvision import VARIANTS
from pipeline.benchmarks.timing import Round
from pipeline.cli import dispatch
from pipeline.config import load
from pipeline.distributed import World

SMALL = ["what=loader", "data.threads=1", "model.image_size=32", "model.patch_size=8"]
SMALL += ["batch_size=16", "images=20", "rounds=2", "methods=[moco]"]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait less for the queues to fill: figures get worse, the report stays what it is."""
    monkeypatch.setattr(timing, "_QUIET_SECONDS", 0.03)


@pytest.fixture
def content(drawn_shards: Path, tmp_path: Path) -> Any:
    """Return the JSON of a small benchmark."""
    output = tmp_path / "loader.json"
    run(load("bench", [*SMALL, f"data.shards={drawn_shards}", f"output={output}"]))
    return json.loads(output.read_text())


def test_report_of_decoding_and_of_a_method(content: Any, capsys: pytest.CaptureFixture[str]) -> None:
    printed = capsys.readouterr().out
    cases = {(row["views"], row["case"]): row for row in content["rows"]}
    ours = [f"{OURS}, {color}" for color in COLORS]
    assert [case for views, case in cases if views == "moco"] == [*VARIANTS, *ours, FEED]
    assert [case for views, case in cases if views != "moco"] == ["DALI readers.webdataset", "DALI readers.file", OURS]
    for row in content["rows"]:
        check_row(row, "moco" if row["views"] == "moco" else "none, decoded", content["rows"])
        assert row["case"] in printed
    assert content["threads"] == 1
    assert content["images"]["samples"] == 48
    assert content["images"]["mean_height"] == content["images"]["mean_width"] == 48
    assert content["settings"]["images"] == 20


def check_row(row: Any, views: str, rows: list[Any]) -> None:
    """Recompute a row's figures from its rounds."""
    assert [each["images"] for each in row["rounds"]] == [32, 32]  # rounded up to whole batches
    costs = [1e3 * each["cpu_seconds"] / each["images"] for each in row["rounds"]]
    assert row["cpu_ms"] == pytest.approx(statistics.median(costs))
    assert (row["cpu_ms_low"], row["cpu_ms_high"]) == pytest.approx((min(costs), max(costs)))
    if row["case"] == FEED:
        assert "ratio" not in row
        return
    peers = [each for each in rows if each["views"] == views and not each["case"].startswith((OURS, FEED))]
    peer = min(peers, key=lambda each: each["cpu_ms"])
    ratios = [a["cpu_seconds"] / b["cpu_seconds"] for a, b in zip(peer["rounds"], row["rounds"], strict=True)]
    assert row["ratio"] == pytest.approx(statistics.median(ratios))
    assert (row["ratio_low"], row["ratio_high"]) == pytest.approx((min(ratios), max(ratios)))


def test_notes_say_cores_and_our_share() -> None:
    def rounds(milliseconds: float) -> list[Round]:
        return [Round(images=10, cpu_seconds=milliseconds / 100, wall_seconds=1.0)]

    measured = {"a peer": rounds(20.0), f"{OURS}, exact": rounds(8.0), FEED: rounds(0.2)}
    (note,) = loader_benchmark._notes("moco", measured, samples_per_second=1000)
    assert "moco, coldpress, exact: 125 images/s per core, so 1,000 samples/s need 8.0 cores" in note
    assert "2.5 [2.5-2.5] % of its CPU time" in note


def test_views_without_jitter_have_one_color_mode(drawn_shards: Path) -> None:
    specs = METHODS["localmim"](32)
    config = load("bench", [*SMALL, f"data.shards={drawn_shards}", "rounds=1"])
    bench = loader_benchmark._bench(config, World(0, 0, 1, torch.device("cpu")))
    measured = loader_benchmark._measure_method(bench, "localmim", specs)
    assert [*measured] == [*VARIANTS, f"{OURS}, {COLORS[0]}", FEED]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["methods=[moco,mocov4]"],
            "methods: mocov4 has no views to measure; choose from moco, simclr, dino, localmim",
        ),
        (["images=0"], "images must be at least 1, got 0"),
        (["samples_per_second=0"], "samples_per_second must be above 0, got 0"),
        (["data.threads=6"], "5 cannot be dealt to 6 workers; say data.threads=5"),
        (["data.shards=/nowhere"], "data.shards: no directory /nowhere"),
        (["data.shards="], "data.shards: missing"),
        (["output=/nowhere/loader.json"], "output: no directory for /nowhere/loader.json"),
    ],
)
def test_refusals(drawn_shards: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["bench", *SMALL, f"data.shards={drawn_shards}", *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


def test_several_processes_are_refused(drawn_shards: Path) -> None:
    config = load("bench", [*SMALL, f"data.shards={drawn_shards}"])
    with pytest.raises(ValueError, match="measures one process, not 2"):
        bench_loader(config, World(0, 0, 2, torch.device("cpu")))
