"""What the loader's benchmark reports and refuses; speed itself is not tested."""

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from data.dali import COLORS
from data.manifest import Manifest, SampleIndex
from pipeline.bench import run
from pipeline.benchmarks import loader as loader_benchmark
from pipeline.benchmarks import timing
from pipeline.benchmarks.loader import FEED, OURS, bench_loader
from pipeline.benchmarks.peers.webdataset_torchvision import VARIANTS
from pipeline.benchmarks.timing import Round
from pipeline.cli import dispatch
from pipeline.compose import load
from pipeline.distributed import World

ONE = World(0, 0, 1, torch.device("cpu"))
SMALL = ["what=loader", "data.threads=1", "model.image_size=32", "model.patch_size=8"]
SMALL += ["batch_size=16", "images=20", "rounds=2", "methods=[moco]"]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait less for the queues to fill: figures get worse, the report stays what it is."""
    monkeypatch.setattr(timing, "_QUIET_SECONDS", 0.03)


@pytest.fixture
def reported(drawn_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """Return the JSON of a small benchmark and what it printed."""
    output = tmp_path / "loader.json"
    run(load("bench", [*SMALL, f"data.shards={drawn_shards}", f"output={output}"]))
    return json.loads(output.read_text()), capsys.readouterr().out


def test_report_of_decoding_and_of_a_method(reported: tuple[Any, str]) -> None:
    content, printed = reported
    cases = {(row["views"], row["case"]): row for row in content["rows"]}
    ours = [f"{part}, {color}" for color in COLORS for part in (OURS, FEED)]
    assert [case for views, case in cases if views == "moco"] == [*VARIANTS, *ours]
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
    if row["case"].startswith(FEED):
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

    ours = {f"{OURS}, {color}": rounds(8.0) for color in COLORS}
    feeds = {f"{FEED}, {color}": rounds(0.2) for color in COLORS}
    notes = loader_benchmark._notes("moco", {"a peer": rounds(20.0), **ours, **feeds}, samples_per_second=1000)
    assert len(notes) == len(COLORS)
    for note, color in zip(notes, COLORS, strict=True):
        assert f"moco, {color}: 125 images/s per core, so 1,000 samples/s need 8.0 cores" in note
        assert "2.5 [2.5-2.5] % of its CPU time" in note


@pytest.mark.usefixtures("unsealed")
def test_decoding_alone_decodes(drawn_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An image that only a decoder finds broken is found by the case without views."""
    copy = Path(shutil.copytree(drawn_shards, tmp_path / "damaged"))
    index = SampleIndex.load(copy, Manifest.load(copy))
    with index.paths[0].open("r+b") as tar:
        tar.seek(int(index.offset[0]))
        scan = tar.read(int(index.size[0])).rindex(b"\xff\xda")
        tar.seek(int(index.offset[0]) + scan + 4)
        tar.write(b"\x09")  # channels of the scan
    bench = loader_benchmark._bench(load("bench", [*SMALL, f"data.shards={copy}"]), ONE)
    stream = loader_benchmark._loader_batches(bench, (), bench.data)
    for _ in range(6):
        next(stream)
    stream.close()
    assert "it does not decode" in caplog.text


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
