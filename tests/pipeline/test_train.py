"""Whole runs of the real command: exact resume, one and two processes, signals, refusals."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.compose import load
from pipeline.evaluate import load_networks
from pipeline.evaluate import run as evaluate
from pipeline.identity import identity
from pipeline.parts import build_schedules
from pipeline.pieces import Reader
from pipeline.plan import imagine
from pipeline.run_directory import read_overrides

REPOSITORY = Path(__file__).parents[2]
STEPS = 24
# Compression and freezing both change shape within the run.
TINY = [
    "batch_size=16",
    f"budget.value={STEPS}",
    "log_every=1",
    "model.name=vit_tiny_patch16_224",
    "model.image_size=32",
    "model.patch_size=8",
    "model.embed_dim=48",
    "model.depth=3",
    "model.num_heads=3",
    "model.reference_length=17",
    "method.hidden_dim=64",
    "method.out_dim=32",
    "rate.base=1e-2",
    "freeze=freezeout",
    "freeze.t0=0.3",
    "freeze.curve=linear",
    "engine.precision=fp32",
    "checkpoint.every_steps=5",
    "checkpoint.keep_last=100",
    "probe.share=0",
    "data.threads=1",
]
STAGED = [
    "compression=staged",
    "compression.stages=[{until:0.4,patch_size:16,dropout:0.5},{until:0.7,patch_size:null,dropout:0.25}]",
]

Train = Callable[..., "Life"]


class Life:
    """One life of a training job on one or more processes."""

    def __init__(self, runs: Path, name: str, shards: Path, ranks: int, overrides: list[str]) -> None:
        self.directory = runs / name
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        staged = [] if any(word.startswith("compression=") for word in overrides) else STAGED
        words = ["train", f"run={name}", f"runs={runs}", f"data.shards={shards}", *TINY, *staged, *overrides]
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "pipeline.cli", *words],
                env=inherited
                | {"OMP_NUM_THREADS": "1", "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(ranks)}
                | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
                cwd=REPOSITORY,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for r in range(ranks)
        ]

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 120
        while self.last_step() < step:
            assert time.monotonic() < deadline
            assert all(p.poll() is None for p in self.processes), self.end()
            time.sleep(0.02)

    def last_step(self) -> int:
        rows = self.rows()
        return rows[-1]["step"] if rows else 0

    def rows(self) -> list[dict[str, float]]:
        path = self.directory / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines() if line.endswith("}") and '"loss"' in line]

    def send(self, number: signal.Signals) -> None:
        for process in self.processes:
            process.send_signal(number)

    def end(self) -> tuple[list[int], str]:
        outputs = ["\n".join(p.communicate(timeout=180)) for p in self.processes]
        return [p.returncode for p in self.processes], "\n".join(outputs)

    def succeed(self) -> str:
        codes, output = self.end()
        assert set(codes) == {0}, output
        return output

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows()]


@pytest.fixture
def train(tmp_path: Path, drawn_shards: Path) -> Iterator[Train]:
    lives = []

    def start(name: str = "run", ranks: int = 1, *overrides: str) -> Life:
        lives.append(Life(tmp_path, name, drawn_shards, ranks, list(overrides)))
        return lives[-1]

    yield start
    for process in (p for life in lives for p in life.processes):
        process.kill()
        process.communicate()


def final_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of the last checkpoint: weights, momentum encoder, optimizer state."""
    reader = Reader(max((directory / "checkpoints").glob("step_*")))
    assert any(name.startswith("exp_avg_sq/") for name in reader.names)
    return {name: reader.whole(name) for name in reader.names}


def assert_same_run(first: Life, second: Life) -> None:
    a, b = final_tensors(first.directory), final_tensors(second.directory)
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]
    assert first.losses() == second.losses()
    assert [r["step"] for r in second.rows()] == list(range(1, len(first.losses()) + 1))


# With probes, which call the backbone on its own.
FSDP2 = ["engine=fsdp2", "probe.share=0.5", "probe.support=16", "probe.queries=8", "probe.k=3"]


@pytest.mark.parametrize(("ranks", "words"), [(1, []), (2, []), (2, FSDP2)], ids=["1", "2", "2-fsdp2"])
def test_stop_and_resume_is_the_uninterrupted_run_bit_for_bit(train: Train, ranks: int, words: list[str]) -> None:
    whole = train("whole", ranks, *words)
    whole.succeed()
    assert len(whole.losses()) == STEPS

    first = train("parts", ranks, *words)
    first.wait_for_step(7)
    first.send(signal.SIGTERM)
    codes, output = first.end()
    assert codes == [75] * ranks, output
    stopped_at = json.loads((first.directory / "status.json").read_text())
    assert stopped_at["state"] == "stopped"
    assert 7 <= stopped_at["step"] < STEPS

    second = train("parts", ranks, *words)
    assert f"resumed at step {stopped_at['step']}" in second.succeed()
    assert_same_run(whole, second)
    assert ("knn_top1_ratio" in (whole.directory / "metrics.jsonl").read_text()) == bool(words)
    frozen = [row["frozen_layers"] for row in second.rows()]
    assert frozen[0] == 0
    assert frozen[-1] == 3
    assert len({row["query_tokens"] for row in second.rows()}) == 3


OTHER_METHODS = {
    "simclr": ["method=simclr"],
    "dino": [
        "method=dino",
        "method.bottleneck_dim=16",
        "method.small_crops=2",
        "method.small_size=16",
        "method.last_layer_start=0.5",
        "model.stochastic_depth=0.2",
    ],
}


@pytest.mark.parametrize("name", OTHER_METHODS)
def test_every_method_resumes_bit_for_bit_and_evaluates_what_it_should(train: Train, name: str) -> None:
    words = OTHER_METHODS[name]
    whole = train("whole", 1, *words)
    whole.succeed()
    first = train("parts", 1, *words)
    first.wait_for_step(7)
    first.send(signal.SIGTERM)
    assert first.end()[0] == [75]
    second = train("parts", 1, *words)
    assert "resumed at step" in second.succeed()
    assert_same_run(whole, second)

    where = [f"run={whole.directory.name}", f"runs={whole.directory.parent}"]
    training = load("train", read_overrides(whole.directory))
    encoder = load_networks(load("evaluate", where), training)[0].representation
    prefix = "state/" if name == "dino" else "weight/"
    key = f"{prefix}encoder.blocks.1.mlp.fc1.weight"
    assert torch.equal(encoder.blocks[1].mlp.fc1.weight, final_tensors(whole.directory)[key])


def test_a_run_does_not_need_the_schedule_file_that_it_started_from(train: Train, tmp_path: Path) -> None:
    path = tmp_path / "schedule.yaml"
    path.write_text("stages: [{until: 0.4, patch_size: 16, dropout: 0.5}, {until: 0.7, dropout: 0.25}]")
    listed = train("listed")
    listed.succeed()
    life = train("filed", 1, "compression.stages=[]", f"compression.file={path}")
    life.succeed()
    assert_same_run(listed, life)
    path.unlink()
    training = load("train", read_overrides(life.directory))
    assert [stage.until for stage in training.compression.stages] == [0.4, 0.7]
    assert "dropout: 0.25" in (life.directory / "config.yaml").read_text()
    evaluate(load("evaluate", ["run=filed", f"runs={tmp_path}", "k=[5]"]))
    assert list((life.directory / "eval").glob("knn-*.json"))


# Moves at every measurement that shows any difference, so that a run of seconds has several.
ADAPTIVE = [
    "compression=adaptive",
    "compression.share=0.5",
    "compression.sub_batches=4",
    "compression.evidence=0",
    "compression.dropouts=[0,0.25,0.5]",
    "compression.start_patch_size=8",
    "compression.start_dropout=0.25",
    "budget.unit=cost",
    "budget.value=1500",
]


def tuning_of(directory: Path, step: int) -> dict[str, Any]:
    """Return what a run had chosen and spent when it saved."""
    saved = json.loads((directory / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())
    tuning: dict[str, Any] = saved["state"]["tuning"]
    return tuning


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_chooses_its_compression_resumes_bit_for_bit(train: Train, ranks: int) -> None:
    whole = train("whole", ranks, *ADAPTIVE)
    said = whole.succeed()
    assert said.count("compression moves from patches of") >= 2
    first = train("parts", ranks, *ADAPTIVE)
    first.wait_for_step(len(whole.losses()) // 2)
    first.send(signal.SIGTERM)
    assert first.end()[0] == [75] * ranks
    stopped_at = json.loads((first.directory / "status.json").read_text())["step"]
    assert tuning_of(first.directory, stopped_at)["spent"] > 0
    second = train("parts", ranks, *ADAPTIVE)
    assert f"resumed at step {stopped_at}" in second.succeed()
    assert_same_run(whole, second)
    steps = int(whole.rows()[-1]["step"])
    assert tuning_of(whole.directory, steps) == tuning_of(second.directory, steps)

    rows = whole.rows()
    assert len({row["query_tokens"] for row in rows}) > 2
    assert rows[-1]["tuning_moves_total"] >= 2
    assert all(row["tuning_cost_total"] <= 0.5 * row["budget_spent"] for row in rows)
    assert rows[-1]["tuning_cost_total"] == pytest.approx(tuning_of(whole.directory, steps)["spent"])
    assert rows[-1]["cost_total"] == pytest.approx(rows[-1]["budget_spent"])


def test_how_a_run_chooses_its_compression_must_stay_when_it_resumes() -> None:
    words = ["run=r", "budget.unit=cost", "budget.value=1"]

    def identity_with(*compression: str) -> dict[str, object]:
        config = load("train", [*words, *compression])
        schedules = build_schedules(config, imagine(config))
        return identity(config, "fingerprint", 1, schedules)

    assert identity_with("compression=adaptive")["compression.share"] == "0.02"
    assert identity_with("compression=adaptive", "compression.share=0.1")["compression.share"] == "0.1"
    # A schedule may take over, and another one after it.
    assert not [key for key in identity_with("compression=constant") if key.startswith("compression")]
    # But for layers that wait for its end; and the warm-up may change where none freezes.
    stages = "compression.stages=[{until:0.5,dropout:0.5}]"
    waiting = identity_with("compression=staged", stages, "freeze=freezeout", "freeze.see_whole=0.1")
    assert waiting["compression"] == "whole images from 0.5 of the budget"
    assert "rate.warmup" in waiting
    assert "rate.warmup" not in identity_with("compression=none", "freeze=none")


def test_sigkill_at_a_random_step_costs_at_most_what_followed_the_checkpoint(train: Train) -> None:
    whole = train("whole")
    whole.succeed()
    killed = train("killed")
    killed.wait_for_step(random.Random(os.getpid()).randint(1, STEPS - 4))
    killed.send(signal.SIGKILL)
    assert killed.end()[0] == [-signal.SIGKILL]
    again = train("killed")
    again.succeed()
    assert_same_run(whole, again)


def test_two_processes_and_one_take_the_same_steps(train: Train) -> None:
    one, two = train("one", 1), train("two", 2)
    one.succeed()
    two.succeed()
    assert len(one.losses()) == STEPS >= 20
    assert one.losses() == pytest.approx(two.losses(), abs=1e-5)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_every_signal_saves(train: Train, number: signal.Signals) -> None:
    life = train()
    life.wait_for_step(2)
    life.send(number)
    codes, output = life.end()
    assert codes == [130 if number == signal.SIGINT else 75], output
    assert "stopped, saved" in output
    step = json.loads((life.directory / "status.json").read_text())["step"]
    assert (life.directory / "checkpoints" / f"step_{step:08d}" / "MANIFEST.json").exists()


def test_a_finished_run_does_nothing_more_and_leaves_its_papers(train: Train) -> None:
    first = train()
    first.succeed()
    listed = {p.name for p in first.directory.iterdir()}
    assert {"config.yaml", "overrides.yaml", "environment.json", "train.log", "metrics.jsonl", "status.json"} <= listed
    assert json.loads((first.directory / "status.json").read_text())["state"] == "finished"
    assert not list((first.directory.parent / ".targets").glob("*.json"))
    before = first.losses()
    again = train()
    assert "finished at step 24" in again.succeed()
    assert again.losses() == before


def refuse(life: Life) -> str:
    """Return the one line that a refused command says."""
    codes, output = life.end()
    assert set(codes) == {2}, output
    assert "Traceback" not in output
    return " ".join(line for line in output.splitlines() if line.startswith("coldpress: "))


def test_what_cannot_be_resumed_is_refused(train: Train) -> None:
    life = train()
    life.wait_for_step(6)
    life.send(signal.SIGTERM)
    life.end()
    assert "resume=never was said; say overwrite=true" in refuse(train("run", 1, "resume=never"))
    papers = {p.name: p.read_bytes() for p in life.directory.iterdir() if p.suffix in (".yaml", ".json", ".jsonl")}
    assert "batch_size must stay what it was" in refuse(train("run", 1, "batch_size=8"))
    said = refuse(train("run", 3))
    assert "batch_size: 16 must be divisible by the number of processes, 3; start 2 or 4 of them" in said, said
    assert "engine.precision must stay what it was" in refuse(train("run", 1, "engine.precision=bf16"))
    assert "optim.decay_vectors must stay what it was" in refuse(train("run", 1, "optim.decay_vectors=false"))
    assert "rate.warmup must stay what it was" in refuse(train("run", 1, "rate.warmup=0.3"))
    assert papers == {name: (life.directory / name).read_bytes() for name in papers}
    fresh = train("run", 1, "overwrite=true", "budget.value=2")
    fresh.succeed()
    assert len(fresh.losses()) == 2


def test_refusals_before_anything_is_written(train: Train, tmp_path: Path) -> None:
    assert "batch_size" in refuse(train("odd", 2, "batch_size=15"))
    assert "nowhere" in refuse(train("lost", 1, f"data.shards={tmp_path}/nowhere"))
    assert "patch_size must divide" in refuse(train("patch", 1, "compression.stages=[{until:1.0,patch_size:5}]"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    assert "holds something that is not a run" in refuse(train("other"))
    assert (tmp_path / "other" / "thesis.tex").exists()


def test_a_broken_sample_is_named_counted_and_survived(train: Train, damaged_shards: Path) -> None:
    life = train("run", 2, f"data.shards={damaged_shards}")
    said = life.succeed()
    assert said.count("the next good one takes its place (1 of at most 100)") in (1, 2)
    assert len(life.losses()) == STEPS
    # Over the epochs a sample comes to either process, which each finds it for itself.
    assert life.rows()[-1]["bad_samples_total"] in (2, 3, 4)


def test_a_batch_larger_than_the_set_is_said_once(train: Train) -> None:
    sentence = "batch_size is larger than the set: a sample may occur twice in a batch"
    assert train("small", 1, "budget.value=1", "batch_size=48").succeed().count(sentence) == 0
    assert train("large", 1, "budget.value=1", "batch_size=50").succeed().count(sentence) == 1


def test_one_broken_sample_too_many_is_one_sentence(train: Train, damaged_shards: Path) -> None:
    codes, said = train("run", 1, f"data.shards={damaged_shards}", "data.max_bad_samples=0").end()
    assert codes == [1]
    assert "Traceback" not in said
    assert re.search(
        r"^coldpress: process 0 failed at step \d: data.max_bad_samples: [12] samples are broken", said, re.M
    )


def test_too_many_skipped_steps_in_a_row_are_one_sentence_and_a_list_of_samples(train: Train) -> None:
    life = train("run", 2, "rate.base=1e38", "rate.warmup=0", "engine.max_skipped=3", "engine.layer_norms=true")
    codes, said = life.end()
    assert codes == [1, 1], said
    assert "Traceback" not in said
    (sentence,) = re.findall(r"^coldpress: (.*)$", said, re.M)
    (stopped_at,) = re.findall(r"engine\.max_skipped: .* in 3 steps in a row, the last of them step (\d+);", sentence)
    step = int(stopped_at)
    for number in range(step - 2, step + 1):
        assert len(re.findall(rf"^step {number} changed nothing", said, re.M)) == 1
    written = json.loads((life.directory / "bad_batch.json").read_text())
    assert str(life.directory / "bad_batch.json") in sentence
    assert written["step"] == step
    assert [rank["rank"] for rank in written["ranks"]] == [0, 1]
    # Every second place of the global batch is a process's own.
    places = range(16 * (step - 1), 16 * step)
    assert [rank["indices"] for rank in written["ranks"]] == [list(places)[r::2] for r in (0, 1)]
    assert all(len(set(rank["samples"])) == 8 for rank in written["ranks"])
    rows = life.rows()
    assert rows[-1]["step"] == step - 1
    assert rows[-1]["skipped_steps_total"] == 2
    assert rows[0]["grad_norm_heads"] > 0
    status = json.loads((life.directory / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", sentence)
    # Who looks at the run a day later has no console.
    assert (life.directory / "train.log").read_text().splitlines()[-1].endswith(f" ERROR {sentence}")


def test_torchrun_starts_the_same_command(tmp_path: Path, drawn_shards: Path) -> None:
    words = ["train", "run=t", f"runs={tmp_path}", f"data.shards={drawn_shards}", *TINY, *STAGED, "budget.value=2"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    done = subprocess.run(
        [*launcher, "-m", "pipeline.cli", *words],
        env=inherited | {"OMP_NUM_THREADS": "1"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 process(es) on cpu on 1 node(s) (" in done.stdout
    assert json.loads((tmp_path / "t" / "status.json").read_text())["state"] == "finished"
