"""Command: what a run's features are worth, never compressed, by k-NN or linear classifiers."""

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
from data.publishing import write_atomically
from pipeline import distributed
from pipeline.checkpoint_files import asked_for
from pipeline.compose import load
from pipeline.config import TrainConfig
from pipeline.distributed import World
from pipeline.following import as_published, wait_for_run
from pipeline.linear_protocol import LinearProtocol, Split
from pipeline.models.vit import ViT
from pipeline.networks import networks
from pipeline.probes.features import extract, extract_share
from pipeline.probes.knn import knn_scores
from pipeline.probes.linear import LinearConfig
from pipeline.probes.scores import Scores
from pipeline.run_directory import read_overrides


class Protocol(Enum):
    """By what features are judged."""

    knn = "knn"
    linear = "linear"


@dataclass
class EvaluateConfig:
    """Evaluation of one run's encoder."""

    run: str
    runs: str = "runs"
    # latest, init (the untrained encoder of the same seed) or a step number.
    checkpoint: str = "latest"
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

    def __post_init__(self) -> None:
        if self.support < 0:
            raise ValueError(f"support must be a number of samples, got {self.support}; 0 takes all.")
        if not self.k or min(self.k) < 1:
            raise ValueError(f"k must list numbers of neighbors of at least 1, got {self.k}.")
        if self.follow and self.checkpoint != "latest":
            raise ValueError(f"follow=true evaluates every checkpoint; leave checkpoint={self.checkpoint} out.")


@dataclass(frozen=True)
class Result:
    """What a protocol found: scores by what it was told, and what else is worth keeping."""

    protocol: str
    scores: dict[str, Scores]
    more: dict[str, Any]


# Without shards of its own an evaluation classifies this share of the training shards by the rest.
HELD_OUT = 0.2

log = logging.getLogger(__name__)


def run(config: EvaluateConfig) -> None:
    """Print what the protocol classifies right, and write it to the run's eval/ directory."""
    directory = Path(config.runs) / config.run
    if config.follow:
        wait_for_run(directory)
    training: TrainConfig = load("train", read_overrides(directory))
    support, queries = splits(config, training)
    # Before the processes meet: what is refused is refused at once.
    encoders = _published(config, directory, training) if config.follow else iter([load_encoder(config, training)])
    world = distributed.start()
    for encoder, name in encoders:
        path = _path(config, directory, name)
        encoder = encoder.to(world.device)
        if config.protocol is Protocol.knn:
            result = by_neighbors(config, encoder, support, queries, world)
        else:
            result = by_classifiers(config, training.seed, encoder, support, queries, world, path.with_suffix(".part"))
        if world.is_main:
            _report(directory, path, name, support, queries, result)


def _published(config: EvaluateConfig, directory: Path, training: TrainConfig) -> Iterator[tuple[ViT, str]]:
    """Yield the encoder of each checkpoint that was not evaluated yet, until the run has ended."""
    for checkpoint in as_published(directory, lambda name: _path(config, directory, name).exists()):
        yield networks(training, checkpoint).representation, checkpoint.name


def by_neighbors(config: EvaluateConfig, encoder: ViT, support: Split, queries: Split, world: World) -> Result:
    """Return what weighted k-NN gets right, by k."""
    known = extract_share(encoder, support.data, support.ids, world)
    asked = extract(encoder, queries.data, queries.ids, world)
    classes = len(Manifest.load(Path(support.data.shards)).classes)
    return Result("knn", {str(k): scores for k, scores in knn_scores(known, asked, config.k, classes).items()}, {})


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
    order = np.random.default_rng(training.seed).permutation(own.samples)
    limit = config.support or own.samples
    if not config.shards:
        held_out = int(own.samples * HELD_OUT)
        if not held_out:
            raise ValueError(
                f"shards: {own.samples} samples are too few to hold some out; give shards=DIR to classify."
            )
        return Split(training.data, order[held_out:][:limit]), Split(training.data, order[:held_out])
    other = Manifest.load(Path(config.shards))
    if other.classes != own.classes:
        raise ValueError(
            f"shards: {config.shards} has {len(other.classes)} classes, {training.data.shards} has "
            f"{len(own.classes)} or others; both must be sharded from the same class names."
        )
    return Split(training.data, order[:limit]), Split(
        replace(training.data, shards=config.shards), np.arange(other.samples)
    )


def load_encoder(config: EvaluateConfig, training: TrainConfig) -> tuple[ViT, str]:
    """Return the encoder of the asked checkpoint and the checkpoint's name.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged.
    """
    if config.checkpoint == "init":
        return networks(training, None).representation, "init"
    checkpoint = asked_for(Path(config.runs) / config.run / "checkpoints", config.checkpoint)
    return networks(training, checkpoint).representation, checkpoint.name


def _report(directory: Path, path: Path, name: str, support: Split, queries: Split, result: Result) -> None:
    log.info(
        "%s of %s, checkpoint %s: %d queries, %d support",
        result.protocol,
        directory,
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
    content = {
        "protocol": result.protocol,
        "checkpoint": name,
        "support": {"shards": support.data.shards, "samples": len(support.ids)},
        "queries": {"shards": queries.data.shards, "samples": len(queries.ids)},
        "top1": {which: scores.top1 for which, scores in result.scores.items()},
        "top5": {which: scores.top5 for which, scores in result.scores.items()},
        "interval": {which: scores.interval for which, scores in result.scores.items()},
        "per_class": {which: scores.per_class for which, scores in result.scores.items()},
        **result.more,
    }
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1).encode())
    log.info("written: %s", path)


def _path(config: EvaluateConfig, directory: Path, name: str) -> Path:
    form = f"-{config.linear.form.value}" if config.protocol is Protocol.linear else ""
    return directory / "eval" / f"{config.protocol.value}{form}-{name}.json"
