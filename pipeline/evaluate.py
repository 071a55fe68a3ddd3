"""Command: what a run's features are worth, never compressed, by k-NN, linear classifiers or fine-tuning."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from data.manifest import Manifest
from data.order import held_out
from data.publishing import write_atomically
from pipeline import distributed
from pipeline.checkpoint_files import asked_for
from pipeline.compose import load
from pipeline.config import TrainConfig
from pipeline.distributed import World
from pipeline.finetune_protocol import FineTuneProtocol, FineTuningConfig, Origin, classified
from pipeline.following import as_published, wait_for_run
from pipeline.linear_protocol import LinearProtocol, Split
from pipeline.methods import Method
from pipeline.models.vit import ViT
from pipeline.networks import ENCODERS, REPRESENTATION, encoder_of, networks
from pipeline.probes.features import extract, extract_share
from pipeline.probes.knn import knn_scores
from pipeline.probes.linear import LinearConfig
from pipeline.probes.scores import Scores
from pipeline.run_directory import read_overrides


class Protocol(Enum):
    """By what features are judged."""

    knn = "knn"
    linear = "linear"
    finetune = "finetune"
    # Of a run that fine-tunes: by what it has learned.
    classifier = "classifier"


@dataclass
class EvaluateConfig:
    """Evaluation of one run's encoder."""

    run: str
    runs: str = "runs"
    # latest, init (the untrained encoder of the same seed) or a step number.
    checkpoint: str = "latest"
    # representation (the one that the method is judged by), online, or momentum (the teacher) of methods that have one.
    encoder: str = REPRESENTATION
    # Evaluate every checkpoint as it is published, until the run has ended.
    follow: bool = False
    # Labelled shards to classify by the training shards; without, a held-out fifth of the training shards.
    shards: str = ""
    # At most so many support samples; 0 takes all.
    support: int = 0
    protocol: Protocol = Protocol.knn
    # Numbers of neighbors; 1 is plain nearest neighbor.
    k: list[int] = field(default_factory=lambda: [1, 10, 20, 100, 200])
    linear: LinearConfig = field(default_factory=LinearConfig)
    finetune: FineTuningConfig = field(default_factory=FineTuningConfig)

    def __post_init__(self) -> None:
        if self.support < 0:
            raise ValueError(f"support must be a number of samples, got {self.support}; 0 takes all.")
        if not self.k or min(self.k) < 1:
            raise ValueError(f"k must list numbers of neighbors of at least 1, got {self.k}.")
        if self.encoder not in ENCODERS:
            raise ValueError(f"encoder must be one of {', '.join(ENCODERS)}, got {self.encoder}.")
        if self.follow and self.checkpoint != "latest":
            raise ValueError(f"follow=true evaluates every checkpoint; leave checkpoint={self.checkpoint} out.")
        if self.protocol is Protocol.finetune and (self.follow or self.support):
            raise ValueError(
                "protocol=finetune is one long run on all support samples; leave follow and support out, "
                "or shard fewer images."
            )


@dataclass(frozen=True)
class Result:
    """What a protocol found: scores by what it was told, and what else is worth keeping."""

    protocol: str
    scores: dict[str, Scores]
    more: dict[str, Any] = field(default_factory=dict)


# Without shards of its own an evaluation classifies this share of the training shards by the rest.
HELD_OUT = 0.2
UNTRAINED = "init"

log = logging.getLogger(__name__)


def run(config: EvaluateConfig) -> int:
    """Print what the protocol classifies right, and write it to the run's eval/ directory; return the exit code."""
    directory = Path(config.runs) / config.run
    if config.follow:
        wait_for_run(directory)
    training: TrainConfig = load("train", read_overrides(directory))
    support, queries = splits(config, training)
    if config.protocol is Protocol.finetune:
        return _fine_tune(config, training, support, queries)
    # Before the processes meet: what is refused is refused at once.
    found = _published(config, directory, training) if config.follow else iter([load_networks(config, training)])
    world = distributed.start()
    for method, name in found:
        path = _path(config, directory, name)
        result = _result(config, training.seed, method, support, queries, world, path.with_suffix(".part"))
        if world.is_main:
            _report(config, path, name, support, queries, result)
    return 0


def _published(config: EvaluateConfig, directory: Path, training: TrainConfig) -> Iterator[tuple[Method, str]]:
    """Yield the networks of each checkpoint that was not evaluated yet, until the run has ended."""
    for checkpoint in as_published(directory, lambda name: _path(config, directory, name).exists()):
        yield networks(training, checkpoint), checkpoint.name


def load_networks(config: EvaluateConfig, training: TrainConfig) -> tuple[Method, str]:
    """Return the networks of the checkpoint that was asked for, and its name."""
    checkpoint = _checkpoint(config)
    return networks(training, checkpoint), checkpoint.name if checkpoint else UNTRAINED


def _checkpoint(config: EvaluateConfig) -> Path | None:
    """Return the checkpoint that was asked for, None for the untrained networks.

    Raises:
        ValueError: there is no such checkpoint.
    """
    if config.checkpoint == UNTRAINED:
        return None
    return asked_for(Path(config.runs) / config.run / "checkpoints", config.checkpoint)


def _result(
    config: EvaluateConfig, seed: int, method: Method, support: Split, queries: Split, world: World, place: Path
) -> Result:
    if config.protocol is Protocol.classifier:
        return Result("classifier", classified(method, queries, world))
    encoder = encoder_of(method, config.encoder).to(world.device)
    if config.protocol is Protocol.knn:
        return by_neighbors(config, encoder, support, queries, world)
    return by_classifiers(config, seed, encoder, support, queries, world, place)


def _fine_tune(config: EvaluateConfig, training: TrainConfig, support: Split, queries: Split) -> int:
    """Train a run that starts from an encoder, and report what its classifier gets right; return the exit code."""
    origin = Origin(config.run, config.runs, training, _checkpoint(config), config.encoder)
    protocol = FineTuneProtocol(config.finetune, origin, 0.0 if config.shards else HELD_OUT)
    world = distributed.start()
    if code := protocol.learn():
        return code
    scores = protocol.judge(queries, world)
    if world.is_main:
        more = {"recipe": protocol.recipe, "epochs": protocol.epochs, "run": protocol.config.run}
        path = _path(config, Path(config.runs) / config.run, origin.name, protocol.recipe)
        _report(config, path, origin.name, support, queries, Result("finetune", scores, more))
        # The run that has learned it knows as well.
        own = protocol.config.directory / "eval" / f"classifier-{protocol.checkpoint.name}.json"
        _write(own, _content(REPRESENTATION, protocol.checkpoint.name, support, queries, Result("classifier", scores)))
    return 0


def by_neighbors(config: EvaluateConfig, encoder: ViT, support: Split, queries: Split, world: World) -> Result:
    """Return what weighted k-NN gets right, by k."""
    known = extract_share(encoder, support.data, support.ids, world, title="support")
    asked = extract(encoder, queries.data, queries.ids, world, title="queries")
    classes = len(Manifest.load(Path(support.data.shards)).classes)
    return Result("knn", {str(k): scores for k, scores in knn_scores(known, asked, config.k, classes).items()})


def by_classifiers(
    config: EvaluateConfig, seed: int, encoder: ViT, support: Split, queries: Split, world: World, place: Path
) -> Result:
    """Return what a linear classifier gets right; `place`: where it is kept until it has learned."""
    found = LinearProtocol(config.linear, encoder, support, seed, world, place).run(queries)
    more = {"rate": found.rate, "held_out": {f"{rate:g}": top1 for rate, top1 in found.held_out.items()}}
    return Result("linear", {config.linear.form.value: found.scores}, more)


def splits(config: EvaluateConfig, training: TrainConfig) -> tuple[Split, Split]:
    """Return support and queries.

    Raises:
        ValueError: the two sets have different classes.
    """
    own = Manifest.load(Path(training.data.shards))
    limit = config.support or own.samples
    if not config.shards:
        known, asked = held_out(own.samples, training.data.held_out or HELD_OUT)
        if not len(asked):
            raise ValueError(
                f"shards: {own.samples} samples are too few to hold some out; give shards=DIR to classify."
            )
        return Split(training.data, known[:limit]), Split(training.data, asked)
    other = Manifest.load(Path(config.shards))
    if other.classes != own.classes:
        raise ValueError(
            f"shards: {config.shards} has {len(other.classes)} classes, {training.data.shards} has "
            f"{len(own.classes)} or others; both must be sharded from the same class names."
        )
    known, _ = held_out(own.samples, training.data.held_out)
    other_data = replace(training.data, shards=config.shards)
    return Split(training.data, known[:limit]), Split(other_data, np.arange(other.samples))


def _report(config: EvaluateConfig, path: Path, name: str, support: Split, queries: Split, result: Result) -> None:
    log.info(
        "%s of %s, %s encoder, checkpoint %s: %d queries, %d support",
        result.protocol,
        Path(config.runs) / config.run,
        config.encoder,
        name,
        len(queries.ids),
        len(support.ids),
    )
    for which, scores in result.scores.items():
        low, high = scores.interval
        log.info(
            "  %-5s top-1 %.2f %% (95 %%: %.2f to %.2f), top-5 %.2f %%",
            f"k={which}" if which.isdigit() else which,
            *(100 * share for share in (scores.top1, low, high, scores.top5)),
        )
    _write(path, _content(config.encoder, name, support, queries, result))
    log.info("written: %s", path)


def _content(encoder: str, checkpoint: str, support: Split, queries: Split, result: Result) -> dict[str, Any]:
    return {
        "protocol": result.protocol,
        "checkpoint": checkpoint,
        "encoder": encoder,
        "support": {"shards": support.data.shards, "samples": len(support.ids)},
        "queries": {"shards": queries.data.shards, "samples": len(queries.ids)},
        "top1": {which: scores.top1 for which, scores in result.scores.items()},
        "top5": {which: scores.top5 for which, scores in result.scores.items()},
        "interval": {which: scores.interval for which, scores in result.scores.items()},
        "per_class": {which: scores.per_class for which, scores in result.scores.items()},
        **result.more,
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1).encode())


def _path(config: EvaluateConfig, directory: Path, name: str, recipe: str = "") -> Path:
    form = config.linear.form.value if config.protocol is Protocol.linear else recipe
    words = [config.protocol.value, *([form] if form else [])]
    words += [config.encoder] if config.encoder != REPRESENTATION else []
    return directory / "eval" / f"{'-'.join([*words, name])}.json"
