"""The drawn set is one that the data package accepts and checks; a small one here, ImageNet's size in the benchmark."""

import json
from pathlib import Path

import numpy as np
import pytest

from data.manifest import Manifest, SampleIndex
from pipeline.bench import run
from pipeline.benchmarks import start
from pipeline.compose import load


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    start.draw_set(tmp_path, shards=7, samples=100)
    return tmp_path


def test_the_set_loads_and_its_samples_follow_each_other(drawn: Path) -> None:
    manifest = Manifest.load(drawn)
    index = SampleIndex.load(drawn, manifest)
    assert manifest.samples == len(index) == sum(index.counts) == 100
    assert set(index.counts) == {14, 15}
    for shard in range(7):
        here = index.shard == shard
        ends = index.offset[here] + index.size[here]
        assert np.all(index.offset[here][1:] > ends[:-1])
        assert np.all(index.offset[here] % 512 == 0)
        assert ends[-1] <= manifest.shards[shard].bytes
    assert np.all(index.label_size > 0)


def test_the_tars_are_holes_and_the_checks_are_real(drawn: Path) -> None:
    tar, idx = drawn / "train-000003.tar", drawn / "train-000003.idx"
    assert tar.stat().st_blocks * 512 < tar.stat().st_size
    index = idx.read_bytes()
    idx.write_bytes(index.replace(b"jpg 1536", b"jpg 2048", 1))
    with pytest.raises(ValueError, match=r"train-000003\.idx: not the index"):
        start.start_once(drawn)
    idx.write_bytes(index)
    with tar.open("ab") as file:
        file.truncate(tar.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"train-000003.tar: \d+ bytes"):
        start.start_once(drawn)


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(start, "SHARDS", 5)
    monkeypatch.setattr(start, "SAMPLES", 60)
    run(load("bench", ["what=start", "rounds=3", f"output={tmp_path / 'start.json'}"]))
    content = json.loads((tmp_path / "start.json").read_text())
    assert [row["stage"] for row in content["rows"]] == ["manifest", "index", "first order", "all"]
    assert (content["shards"], content["samples"]) == (5, 60)
    assert all(row["seconds_low"] <= row["seconds"] <= row["seconds_high"] for row in content["rows"])
    assert "5 shards, 60 samples" in capsys.readouterr().out
