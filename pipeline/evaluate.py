"""Command: k-NN accuracy of a run's encoder, uncompressed, once or at every checkpoint."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data.loader import LoaderConfig
from data.manifest import Manifest
from data.publishing import write_atomically
from pipeline import distributed
from pipeline.checkpoint_files import asked_for
from pipeline.compose import load
from pipeline.config import EvaluateConfig, TrainConfig
from pipeline.distributed import World
from pipeline.following import as_published, wait_for_run
from pipeline.models.vit import ViT
from pipeline.networks import networks
from pipeline.probes.features import extract
from pipeline.probes.knn import knn_accuracy
from pipeline.run_directory import read_overrides

# Without shards of its own an evaluation classifies this share of the training shards by the rest.
HELD_OUT = 0.2

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Which samples of which shards."""

    data: LoaderConfig
    ids: np.ndarray


def run(config: EvaluateConfig) -> None:
    """Print the weighted k-NN accuracy for each k and write it to the run's eval/ directory."""
    directory = Path(config.runs) / config.run
    if config.follow:
        wait_for_run(directory)
    training: TrainConfig = load("train", read_overrides(directory))
    support, queries = splits(config, training)
    # Before the processes meet: what is refused is refused at once.
    encoders = _published(directory, training) if config.follow else iter([load_encoder(config, training)])
    world = distributed.start()
    for encoder, name in encoders:
        accuracies = evaluate(config, encoder.to(world.device), support, queries, world)
        if world.is_main:
            _report(directory, name, support, queries, accuracies)


def _published(directory: Path, training: TrainConfig) -> Iterator[tuple[ViT, str]]:
    """Yield the encoder of each checkpoint that was not evaluated yet, until the run has ended."""
    for checkpoint in as_published(directory, lambda name: _result(directory, name).exists()):
        yield networks(training, checkpoint).representation, checkpoint.name


def evaluate(config: EvaluateConfig, encoder: ViT, support: Split, queries: Split, world: World) -> dict[int, float]:
    """Return top-1 accuracy by k."""
    known = extract(encoder, support.data, support.ids, world)
    asked = extract(encoder, queries.data, queries.ids, world)
    return {k: knn_accuracy(*known, *asked, k) for k in config.k}


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


def _report(directory: Path, name: str, support: Split, queries: Split, accuracies: dict[int, float]) -> None:
    log.info(
        "k-NN of %s, checkpoint %s: %d queries, %d support",
        directory,
        name,
        len(queries.ids),
        len(support.ids),
    )
    for k, accuracy in accuracies.items():
        log.info("  k=%-4d top-1 %.2f %%", k, 100 * accuracy)
    result = {
        "checkpoint": name,
        "support": {"shards": support.data.shards, "samples": len(support.ids)},
        "queries": {"shards": queries.data.shards, "samples": len(queries.ids)},
        "top1": {str(k): a for k, a in accuracies.items()},
    }
    path = _result(directory, name)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, json.dumps(result, indent=1).encode())
    log.info("written: %s", path)


def _result(directory: Path, name: str) -> Path:
    return directory / "eval" / f"knn-{name}.json"
