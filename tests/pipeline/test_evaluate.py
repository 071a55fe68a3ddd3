"""Which encoder, which samples."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from data.drawn import draw_image_folder
from data.shard import ShardConfig
from data.shard import run as shard
from pipeline import distributed, evaluate
from pipeline.checkpoint import TrainState
from pipeline.compose import load
from pipeline.networks import encoder_of
from pipeline.parts import build
from pipeline.preemption import SIGNALS, StopRequest
from pipeline.run_directory import RunDirectory
from pipeline.train import train

RUN = ["experiment=demo", "budget.value=2", "batch_size=8", "log_every=1", "data.threads=1", "monitor.prometheus=false"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, drawn_shards: Path) -> Path:
    """Return a directory with a finished run of two steps."""
    directory = tmp_path_factory.mktemp("runs")
    overrides = [*RUN, "run=r", f"runs={directory}", f"data.shards={drawn_shards}"]
    config = load("train", overrides)
    world = distributed.start()
    papers = RunDirectory(config)
    parts = build(config, world)
    papers.open(overrides)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        assert train(config, world, StopRequest(), parts, TrainState(), papers) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return directory


def knn(runs: Path, *overrides: str) -> dict[str, object]:
    evaluate.run(load("evaluate", ["run=r", f"runs={runs}", "k=[5]", *overrides]))
    newest = max((runs / "r" / "eval").glob("*.json"), key=lambda p: p.stat().st_mtime_ns)
    result: dict[str, object] = json.loads(newest.read_text())
    return result


def test_latest_checkpoint_by_a_held_out_fifth(runs: Path) -> None:
    result = knn(runs)
    assert result["checkpoint"] == "step_00000002"
    assert (result["support"]["samples"], result["queries"]["samples"]) == (39, 9)  # type: ignore[index]


def test_untrained_and_trained_encoders_differ(runs: Path) -> None:
    config = load("evaluate", ["run=r", f"runs={runs}", "checkpoint=init"])
    training = load("train", [*RUN, "run=r", f"runs={runs}"])
    before, name = evaluate.load_networks(config, training)
    assert name == "init"
    config.checkpoint = "2"
    after, _ = evaluate.load_networks(config, training)
    assert not torch.equal(before.encoder.blocks[0].attn.qkv.weight, after.encoder.blocks[0].attn.qkv.weight)
    assert torch.equal(before.encoder.patch.weight, after.encoder.patch.weight)


def test_other_shards_as_queries(runs: Path, tmp_path: Path) -> None:
    draw_image_folder(tmp_path / "val", classes=4, per_class=5, size=48, seed=9)
    shard(ShardConfig(str(tmp_path / "val"), str(tmp_path / "shards"), workers=1))
    result = knn(runs, f"shards={tmp_path / 'shards'}")
    assert (result["support"]["samples"], result["queries"]["samples"]) == (48, 20)  # type: ignore[index]
    shutil.rmtree(tmp_path / "val" / "disc", ignore_errors=True)
    draw_image_folder(tmp_path / "three", classes=3, per_class=2, size=48)
    shard(ShardConfig(str(tmp_path / "three"), str(tmp_path / "shards3"), workers=1))
    with pytest.raises(ValueError, match=r"has 3 classes, .* has 4 or others; both must be sharded from"):
        knn(runs, f"shards={tmp_path / 'shards3'}")


def test_a_run_that_was_moved_is_evaluated_where_it_is(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "r", tmp_path / "elsewhere" / "r")
    (tmp_path / "elsewhere" / "r" / "checkpoints" / "step_00000002").rename(
        tmp_path / "elsewhere" / "r" / "checkpoints" / "step_00000001"
    )
    assert knn(tmp_path / "elsewhere")["checkpoint"] == "step_00000001"


def test_too_few_samples_to_hold_out_are_refused(runs: Path, tmp_path: Path) -> None:
    draw_image_folder(tmp_path / "two", classes=2, per_class=2, size=48)
    shard(ShardConfig(str(tmp_path / "two"), str(tmp_path / "shards2"), workers=1))
    config = load("evaluate", ["run=r", f"runs={runs}"])
    training = load("train", [*RUN, "run=r", f"runs={runs}", f"data.shards={tmp_path / 'shards2'}"])
    with pytest.raises(ValueError, match="shards: 4 samples are too few to hold some out"):
        evaluate.splits(config, training)


@pytest.mark.parametrize(
    ("checkpoint", "sentence"),
    [
        ("best", "checkpoint must be latest, init or a step number, got best"),
        ("7", r"checkpoint: step 7 is not usable \(there is none\); steps there: 2\."),
    ],
)
def test_checkpoints_that_are_not_there(runs: Path, checkpoint: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        knn(runs, f"checkpoint={checkpoint}")


def test_every_checkpoint_of_a_finished_run_and_none_twice(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "r", tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "eval", ignore_errors=True)
    checkpoints = tmp_path / "r" / "checkpoints"
    shutil.copytree(checkpoints / "step_00000002", checkpoints / "step_00000001")
    config = load("evaluate", ["run=r", f"runs={tmp_path}", "k=[5]", "follow=true"])
    evaluate.run(config)
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "r" / "eval").iterdir()}
    assert sorted(written) == ["knn-step_00000001.json", "knn-step_00000002.json"]
    evaluate.run(config)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "r" / "eval").iterdir()} == written


def test_every_checkpoint_is_not_one_of_them() -> None:
    with pytest.raises(ValueError, match=r"follow=true evaluates every checkpoint; leave checkpoint=7 out\."):
        load("evaluate", ["run=r", "follow=true", "checkpoint=7"])


def test_another_encoder_has_a_result_of_its_own(runs: Path) -> None:
    def result(*words: str) -> dict[str, object]:
        return knn(runs, "checkpoint=2", *words)

    online, momentum = result("encoder=online"), result("encoder=momentum")
    assert (online["encoder"], momentum["encoder"]) == ("online", "momentum")
    names = {path.name for path in (runs / "r" / "eval").iterdir()}
    assert {"knn-online-step_00000002.json", "knn-momentum-step_00000002.json"} <= names
    training = load("train", [*RUN, "run=r", f"runs={runs}"])
    kernels = []
    for which in ("representation", "online", "momentum"):
        config = load("evaluate", ["run=r", f"runs={runs}", "checkpoint=2", f"encoder={which}"])
        method, _ = evaluate.load_networks(config, training)
        kernels.append(encoder_of(method, config.encoder).blocks[0].attn.qkv.weight)
    # MoCo-v3 is judged by its online encoder.
    assert torch.equal(kernels[0], kernels[1])
    assert not torch.equal(kernels[1], kernels[2])


def test_an_encoder_that_there_is_not() -> None:
    with pytest.raises(ValueError, match=r"encoder must be one of representation, online, momentum, got teacher\."):
        load("evaluate", ["run=r", "encoder=teacher"])
