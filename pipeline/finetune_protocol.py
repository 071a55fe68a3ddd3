"""The fine-tuning protocol: a training run that starts from an encoder, and its classifier judged at the end."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from data.loader import LoaderConfig
from data.manifest import Manifest
from data.order import held_out
from monitoring.sinks import MonitorConfig
from pipeline import train
from pipeline.checkpoint_files import asked_for
from pipeline.compose import load
from pipeline.config import TrainConfig
from pipeline.distributed import World, on_main
from pipeline.exports.encoder import Encoder, read_encoder, untrained_encoder
from pipeline.exports.form import form_of
from pipeline.exports.tensor_file import write_tensors
from pipeline.exports.timm_layout import tensors
from pipeline.linear_protocol import Split
from pipeline.methods import FineTune, LocalMIMConfig
from pipeline.networks import REPRESENTATION, networks
from pipeline.preemption import leave_when_asked
from pipeline.probes.features import extract_share
from pipeline.probes.scores import MOST, Scores
from pipeline.watchdog import WatchdogConfig

# Recipe -> epochs, those of the published ViT-B; what else it says stands in configs/method/finetune_*.yaml.
RECIPES = {"deit": 150, "mae": 100, "localmim": 100}
AUTO = "auto"
# What the protocol says itself.
OURS = ("run", "runs", "method", "method.classes", "model.weights", "model.positions", "data.shards", "data.held_out")

log = logging.getLogger(__name__)


@dataclass
class FineTuningConfig:
    """Fine-tuning of one run's encoder."""

    # deit, mae or localmim; auto is localmim for runs of LocalMIM, else deit.
    recipe: str = AUTO
    # 0 are the recipe's own, those of a ViT-B on ImageNet.
    epochs: int = 0
    # More words for `coldpress train`: [batch_size=512,engine=zero2,rate.base=1e-3], ...
    words: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.recipe not in (AUTO, *RECIPES):
            raise ValueError(f"finetune.recipe must be one of {', '.join((AUTO, *RECIPES))}, got {self.recipe}.")
        if self.epochs < 0:
            raise ValueError(f"finetune.epochs must be at least 0, got {self.epochs}; 0 are the recipe's own.")
        for word in self.words:
            if word.partition("=")[0] in OURS:
                raise ValueError(f"finetune.words: {word} is what the protocol says itself; take it out.")

    def chosen(self, training: TrainConfig) -> str:
        """Return the recipe for an encoder of a run."""
        if self.recipe != AUTO:
            return self.recipe
        return "localmim" if isinstance(training.method, LocalMIMConfig) else "deit"


@dataclass(frozen=True)
class Origin:
    """Which encoder is fine-tuned: of which run, at which checkpoint (None is untrained), and which of its encoders."""

    run: str
    runs: str
    training: TrainConfig
    checkpoint: Path | None
    encoder: str

    @property
    def name(self) -> str:
        """Return the checkpoint's name."""
        return self.checkpoint.name if self.checkpoint else "init"

    def open(self) -> Encoder:
        """Return the encoder, tensor by tensor."""
        if self.checkpoint is None:
            return untrained_encoder(self.training, self.encoder)
        return read_encoder(self.training, self.checkpoint, self.encoder)


class FineTuneProtocol:
    """Fine-tuning as a run of its own beside the one that it starts from, and what it classifies right."""

    def __init__(self, config: FineTuningConfig, origin: Origin, share_held_out: float) -> None:
        """Compose the run.

        Raises:
            ValueError: words that a training run does not take, or shards without labels.
        """
        self.recipe = config.chosen(origin.training)
        self.epochs = config.epochs or RECIPES[self.recipe]
        self._origin = origin
        suffix = f"-{origin.encoder}" if origin.encoder != REPRESENTATION else ""
        run = f"{origin.run}-finetune-{self.recipe}-{origin.name}{suffix}"
        self._weights = Path(origin.runs) / origin.run / "eval" / f"{run}.safetensors"
        self._words = [*self._own_words(run, share_held_out), *config.words]
        # That there is no file of weights yet is seen by who builds the model.
        self.config: TrainConfig = load("train", self._words)

    def learn(self) -> int:
        """Train, or go on training; return the exit code, 0 once the budget is spent. Every process must call this."""
        on_main(self._write_weights)
        log.info("fine-tuning is run %s", self.config.directory)
        code = train.run(self.config, self._words)
        # The run is over, and with it what a signal meant to it.
        leave_when_asked()
        return code

    @property
    def checkpoint(self) -> Path:
        """Return the newest checkpoint of the run."""
        return asked_for(self.config.directory / "checkpoints", "latest")

    def judge(self, queries: Split, world: World) -> dict[str, Scores]:
        """Return what the classifier, and if there is one its average, gets right. Every process must call this."""
        scores = classified(networks(self.config, self.checkpoint), queries, world)
        on_main(lambda: self._weights.unlink(missing_ok=True))
        return scores

    def _write_weights(self) -> None:
        encoder = self._origin.open()
        self._weights.parent.mkdir(exist_ok=True)
        write_tensors(self._weights, tensors(encoder, form_of(encoder.config, 0, 0)))

    def _own_words(self, run: str, share_held_out: float) -> list[str]:
        training, model = self._origin.training, self._origin.training.model
        manifest = Manifest.load(Path(training.data.shards))
        learned, _ = held_out(manifest.samples, share_held_out)
        if not manifest.classes:
            raise ValueError(f"data.shards={training.data.shards} has no labels; fine-tuning needs some.")
        sizes = {name: getattr(model, name) for name in ("name", "image_size", "patch_size", "reference_length")}
        return [
            f"run={run}",
            f"runs={self._origin.runs}",
            f"method=finetune_{self.recipe}",
            f"method.classes={len(manifest.classes)}",
            *(f"model.{name}={value}" for name, value in (sizes | model.changes).items()),
            f"model.weights={self._weights}",
            *_changes("data", training.data, LoaderConfig(held_out=training.data.held_out)),
            f"data.held_out={share_held_out}",
            *_changes("monitor", training.monitor, MonitorConfig()),
            *_changes("watchdog", training.watchdog, WatchdogConfig()),
            f"engine.precision={training.engine.precision.value}",
            f"seed={training.seed}",
            "budget.unit=samples",
            f"budget.value={self.epochs * len(learned)}",
        ]


def classified(method: Any, queries: Split, world: World) -> dict[str, Scores]:
    """Return what a fine-tuned run classifies right by its weights, and by their average if it keeps one.

    Raises:
        ValueError: the run is of another method.
    """
    if not isinstance(method, FineTune):
        raise ValueError(
            f"protocol=classifier: {type(method).__name__} has no classifier; "
            "say protocol=finetune to train one, or protocol=knn or linear."
        )
    method.to(world.device).prepare(world.device, next(method.parameters()).dtype)
    scores = {"weights": _scores(method, queries, world, averaged=False)}
    if method.momentum_encoders():
        scores["average"] = _scores(method, queries, world, averaged=True)
    return scores


def _scores(method: FineTune, queries: Split, world: World, *, averaged: bool) -> Scores:
    def encode(images: Tensor, index: Tensor) -> Tensor:
        return method.logits(images, index, averaged=averaged)

    logits, labels = extract_share(method.encoder, queries.data, queries.ids, world, encode, title="queries")
    ranking = logits.topk(min(MOST, method.classes)).indices
    return Scores.of(ranking, labels, method.classes).of_all_ranks()


def _changes(section: str, config: Any, usual: Any) -> list[str]:
    """Return the words that make a section of a config what it is."""
    values = {entry.name: getattr(config, entry.name) for entry in fields(config)}
    return [f"{section}.{name}={value}" for name, value in values.items() if value != getattr(usual, name)]
