"""`coldpress evaluate protocol=finetune`: a run of its own, stopped, resumed, on two processes, and what it leaves."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from data.drawn import draw_image_folder
from data.shard import ShardConfig
from data.shard import run as shard
from pipeline import distributed, evaluate
from pipeline.checkpoint_files import publish, seal, temporary_of
from pipeline.compose import load
from pipeline.config import TrainConfig
from pipeline.engines import build_engine
from pipeline.finetune_protocol import FineTuneProtocol, FineTuningConfig, Origin
from pipeline.methods import FineTuneMAEConfig, build_method
from pipeline.models.vit import ViT, ViTConfig
from pipeline.networks import networks
from pipeline.parts import check_labels
from pipeline.pieces import Reader
from pipeline.run_directory import read_overrides

REPOSITORY = Path(__file__).parents[2]
PRETRAINING = [
    "batch_size=16",
    "budget.value=5",
    "model.name=vit_tiny_patch16_224",
    "model.image_size=32",
    "model.patch_size=8",
    "model.embed_dim=48",
    "model.depth=2",
    "model.num_heads=3",
    "model.reference_length=17",
    "method.hidden_dim=64",
    "method.out_dim=32",
    "engine.precision=fp32",
    "data.threads=1",
    "monitor.prometheus=false",
]
STEPS = 8
WORDS = f"finetune.words=[batch_size=16,budget.unit=steps,budget.value={STEPS},log_every=1,checkpoint.every_steps=3]"
TUNED = "r-finetune-deit-step_00000005"
# The command; asked to leave in the fourth forward where that is said.
PROGRAM = """
import os, signal, sys
from pipeline.methods.finetune import FineTune
before, calls = FineTune.forward, []

def forward(*words):
    calls.append(0)
    if len(calls) == 4 and "stopped" in os.environ:
        os.kill(os.getpid(), signal.SIGTERM)
    return before(*words)

FineTune.forward = forward
from pipeline.cli import main
main(sys.argv[1:])
"""


def pretrained(runs: Path, shards: Path, *words: str) -> Path:
    """Save a run's first checkpoint, as an engine does, and return the folder of runs."""
    words = ("run=r", f"runs={runs}", f"data.shards={shards}", *PRETRAINING, *words)
    training: TrainConfig = load("train", list(words))
    world = distributed.start()
    torch.manual_seed(3)
    method = build_method(training.method, ViT(training.model, 0))
    engine = build_engine(method, training.engine, training.optim, local_batch=16, device=world.device)
    checkpoint = runs / "r" / "checkpoints" / "step_00000005"
    engine.save(temporary_of(checkpoint))
    names = [path.name for path in temporary_of(checkpoint).iterdir()]
    for name in names:
        seal(temporary_of(checkpoint) / name)
    publish(checkpoint, names, {"state": {"step": 5, "samples": 80, "cost": 1.0}, "progress": 1.0, "identity": {}})
    (runs / "r" / "overrides.yaml").write_text("".join(f"- {json.dumps(word)}\n" for word in words))
    return runs


def command(runs: Path, *words: str, ranks: int = 1, stopped: bool = False) -> tuple[list[int], list[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    inherited |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **({"stopped": ""} if stopped else {})}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "evaluate", "run=r", f"runs={runs}", "protocol=finetune", WORDS, *words],
            env=inherited
            | {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(ranks)}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for r in range(ranks)
    ]
    said = [process.communicate(timeout=240)[0] for process in processes]
    return [process.returncode for process in processes], said


def result_of(runs: Path, path: str = "r/eval/finetune-deit-step_00000005.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((runs / path).read_text())
    return found


def tensors(runs: Path) -> dict[str, torch.Tensor]:
    reader = Reader(runs / TUNED / "checkpoints" / f"step_{STEPS:08d}")
    return {name: reader.whole(name) for name in reader.names}


def losses(runs: Path) -> list[float]:
    rows = map(json.loads, (runs / TUNED / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, drawn_shards: Path) -> Path:
    """Return runs of which one was fine-tuned by the command, without a break."""
    runs = pretrained(tmp_path_factory.mktemp("whole"), drawn_shards)
    codes, said = command(runs)
    assert codes == [0], said
    assert "top-1" in said[0]
    return runs


def test_it_is_a_run_of_its_own_and_both_runs_know_the_result(tuned: Path) -> None:
    result = result_of(tuned)
    assert (result["protocol"], result["recipe"], result["run"]) == ("finetune", "deit", TUNED)
    assert result["top1"].keys() == {"weights", "average"}
    # A fifth is held out, of which nothing is learned.
    assert (result["support"]["samples"], result["queries"]["samples"]) == (39, 9)
    own = result_of(tuned, f"{TUNED}/eval/classifier-step_{STEPS:08d}.json")
    assert own["top1"] == result["top1"]
    assert json.loads((tuned / TUNED / "status.json").read_text())["state"] == "finished"
    assert len(losses(tuned)) == STEPS
    assert not list((tuned / "r" / "eval").glob("*.safetensors"))


def test_it_starts_from_the_encoder_that_was_asked_for(tuned: Path, tmp_path: Path) -> None:
    training: TrainConfig = load("train", read_overrides(tuned / "r"))
    method = networks(training, tuned / "r" / "checkpoints" / "step_00000005")
    for which, encoder in (("online", method.encoder), ("momentum", method.momentum_encoders()[0].network["encoder"])):  # type: ignore[index]
        origin = Origin("r", str(tuned), training, tuned / "r" / "checkpoints" / "step_00000005", which)
        protocol = FineTuneProtocol(FineTuningConfig(epochs=1), origin, 0.2)
        protocol._write_weights()
        started = ViT(protocol.config.model, 0)
        images, index = torch.randn(4, 3, 32, 32), torch.arange(4)
        whole = training.compression.at(1.0)
        torch.testing.assert_close(started(images, whole, index), encoder(images, whole, index), atol=1e-6, rtol=0)
        assert torch.equal(started.blocks[1].mlp.fc1.weight, encoder.blocks[1].mlp.fc1.weight)
        # The sines and cosines that pre-training had are where learned positions start.
        assert isinstance(started.positions, torch.nn.Parameter)
        protocol._weights.unlink()


def test_stopped_and_started_again_it_is_the_same_to_the_bit(tuned: Path, tmp_path: Path, drawn_shards: Path) -> None:
    runs = pretrained(tmp_path, drawn_shards)
    codes, said = command(runs, stopped=True)
    assert codes == [75], said
    assert "stopped, saved at step 4" in said[0]
    assert not (runs / "r" / "eval" / "finetune-deit-step_00000005.json").exists()
    codes, said = command(runs)
    assert codes == [0], said
    assert "resumed at step 4" in said[0]
    whole, parts = tensors(tuned), tensors(runs)
    assert whole.keys() == parts.keys()
    assert not [name for name in whole if not torch.equal(whole[name], parts[name])]
    assert losses(runs) == losses(tuned)
    assert result_of(runs)["per_class"] == result_of(tuned)["per_class"]


def test_two_processes_learn_and_classify_as_one(tuned: Path, tmp_path: Path, drawn_shards: Path) -> None:
    runs = pretrained(tmp_path, drawn_shards)
    codes, said = command(runs, ranks=2)
    assert codes == [0, 0], said
    assert losses(runs) == pytest.approx(losses(tuned), abs=2e-4)
    # Which process has which sample, its erased rectangle, and with which one it is mixed: from the first step on.
    assert losses(runs)[0] == pytest.approx(losses(tuned)[0], abs=1e-6)
    assert result_of(runs)["queries"] == result_of(tuned)["queries"] | {"shards": result_of(runs)["queries"]["shards"]}


def test_a_fine_tuned_run_is_classified_by_itself(tuned: Path) -> None:
    before = result_of(tuned, f"{TUNED}/eval/classifier-step_{STEPS:08d}.json")
    evaluate.run(load("evaluate", [f"run={TUNED}", f"runs={tuned}", "protocol=classifier"]))
    again = result_of(tuned, f"{TUNED}/eval/classifier-step_{STEPS:08d}.json")
    # The same held-out samples, and the same answers.
    assert again == before
    with pytest.raises(ValueError, match=r"protocol=classifier: MoCo has no classifier; say protocol=finetune"):
        evaluate.run(load("evaluate", ["run=r", f"runs={tuned}", "protocol=classifier"]))


@pytest.fixture
def origin(tuned: Path) -> Origin:
    training: TrainConfig = load("train", read_overrides(tuned / "r"))
    return Origin("r", str(tuned), training, tuned / "r" / "checkpoints" / "step_00000005", "representation")


def test_budget_classes_and_recipe_follow_from_set_and_method(origin: Origin) -> None:
    protocol = FineTuneProtocol(FineTuningConfig(), origin, 0.2)
    assert (protocol.recipe, protocol.epochs) == ("deit", 150)
    config = protocol.config
    assert (config.budget.value, config.budget.unit.value) == (150 * 39, "samples")
    assert (config.method.classes, config.data.held_out) == (4, 0.2)
    assert config.data.threads == 1
    assert not config.monitor.prometheus
    assert config.engine.precision is origin.training.engine.precision
    assert FineTuneProtocol(FineTuningConfig("mae", epochs=3), origin, 0.0).config.budget.value == 3 * 48
    said = ["run=r", "method=localmim", "budget.value=1", f"data.shards={origin.training.data.shards}"]
    other = Origin("r", origin.runs, load("train", said), None, "representation")
    assert FineTuneProtocol(FineTuningConfig(), other, 0.2).recipe == "localmim"
    assert other.name == "init"


def test_words_of_the_run_may_be_changed_but_not_what_makes_it_this_protocol(origin: Origin) -> None:
    words = ["rate.base=0.5", "engine=zero2", "optim.betas=[0.5,0.6]", "method.mixup=0"]
    config = FineTuneProtocol(FineTuningConfig(words=words), origin, 0.2).config
    assert (config.rate.base, config.engine.stage, config.optim.betas, config.method.mixup) == (0.5, 2, [0.5, 0.6], 0)
    for word in ("run=x", "method=moco", "method.classes=3", "model.weights=timm", "data.held_out=0"):
        with pytest.raises(ValueError, match=rf"finetune\.words: {word} is what the protocol says itself; take it out"):
            FineTuningConfig(words=[word])
    with pytest.raises(ValueError, match=r"rate\.bsae is not a key of coldpress train; did you mean rate\.base\?"):
        FineTuneProtocol(FineTuningConfig(words=["rate.bsae=1"]), origin, 0.2)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["finetune.recipe=beit"], r"finetune\.recipe must be one of auto, deit, mae, localmim, got beit"),
        (["finetune.epochs=-1"], r"finetune\.epochs must be at least 0, got -1; 0 are the recipe's own"),
        (["follow=true"], "protocol=finetune is one long run on all support samples; leave follow and support out"),
        (["support=100"], "protocol=finetune is one long run on all support samples; leave follow and support out"),
    ],
)
def test_refusals(words: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load("evaluate", ["run=r", "protocol=finetune", *words])


def test_a_checkpoint_of_another_model_is_refused(tuned: Path, tmp_path: Path) -> None:
    run = tmp_path / "r"
    run.mkdir()
    (run / "checkpoints").symlink_to(tuned / "r" / "checkpoints")
    words = [word.replace("embed_dim=48", "embed_dim=96") for word in read_overrides(tuned / "r")]
    (run / "overrides.yaml").write_text("".join(f"- {json.dumps(word)}\n" for word in words))
    config = load("evaluate", ["run=r", f"runs={tmp_path}", "protocol=finetune"])
    with pytest.raises(ValueError, match=r"it is of another model than overrides\.yaml says; take another checkpoint"):
        evaluate.run(config)


def test_a_set_without_labels_or_with_other_classes_is_refused(tmp_path: Path) -> None:
    draw_image_folder(tmp_path / "images", classes=1, per_class=12, size=48)
    (flat,) = [path for path in (tmp_path / "images").iterdir() if path.is_dir()]
    shard(ShardConfig(str(flat), str(tmp_path / "shards"), workers=1))
    runs = pretrained(tmp_path / "runs", tmp_path / "shards")
    with pytest.raises(ValueError, match=r"data\.shards=.* has no labels; fine-tuning needs some"):
        evaluate.run(load("evaluate", ["run=r", f"runs={runs}", "protocol=finetune"]))
    method = build_method(FineTuneMAEConfig(classes=3), ViT(ViTConfig("vit_tiny_patch16_224", 32, 8, depth=1), 0))
    with pytest.raises(ValueError, match=r"method\.classes must be that of data\.shards, which has no labels, got 3"):
        check_labels(method, ())
    with pytest.raises(ValueError, match=r"data\.shards, which has 2 classes, got 3; change one of them"):
        check_labels(method, ("cat", "dog"))
    check_labels(method, ("cat", "dog", "fish"))
