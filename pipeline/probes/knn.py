"""Weighted k-nearest-neighbor classification, and the probe that runs it during training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.loader import LoaderConfig
from pipeline.distributed import World, gather, world_size
from pipeline.models.vit import ViT
from pipeline.probes.features import NONE, extract, extract_share
from pipeline.probes.scores import Scores

TEMPERATURE = 0.07
CHUNK = 1024


def knn_scores(
    support: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor], ks: Sequence[int], classes: int
) -> dict[int, Scores]:
    """Return what weighted k-NN with cosine similarity classifies right, for several k.

    Each of the k nearest support features votes exp(similarity / 0.07) for its label (Wu et al., 2018; the protocol of
    Caron et al., 2021). support: this process's share, features [N, D] and labels [N], N alike on every process, of
    which labels `NONE` do not count; queries: all of them on every process, taken in chunks. Every process must call
    this.
    """
    known, labels = F.normalize(support[0], dim=1), support[1]
    scores = {k: Scores.none(classes) for k in ks}
    for features, truth in zip(torch.split(queries[0], CHUNK), torch.split(queries[1], CHUNK), strict=True):
        similarity, nearest = _nearest(known, labels, F.normalize(features, dim=1), max(ks))
        for k in ks:
            votes = similarity.new_zeros(len(features), classes)
            # Where there are fewer than k samples, the rest votes with exp(-inf), for whomever.
            votes.scatter_add_(1, nearest[:, :k].clamp_min(0), (similarity[:, :k] / TEMPERATURE).exp())
            scores[k] += Scores.of(votes.argsort(dim=1, descending=True, stable=True), truth, classes)
    return scores


def knn_accuracy(support: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor], k: int, classes: int) -> float:
    """Return the top-1 accuracy for one k; see `knn_scores`."""
    return knn_scores(support, queries, [k], classes)[k].top1


def _nearest(known: Tensor, labels: Tensor, features: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return similarities [M, most] and labels [M, most] of the nearest of all processes' samples, nearest first."""
    similarity = (features @ known.T).masked_fill(labels == NONE, -torch.inf)
    similarity = F.pad(similarity, (0, max(0, most - len(known))), value=-torch.inf)
    labels = F.pad(labels, (0, max(0, most - len(known))), value=NONE)
    similarity, nearest = similarity.topk(most)
    if world_size() > 1:
        similarity, found = (_beside(each) for each in (similarity, labels[nearest]))
        similarity, best = similarity.topk(most)
        return similarity, found.gather(1, best)
    return similarity, labels[nearest]


def _beside(mine: Tensor) -> Tensor:
    """Return what all processes have [M, n], beside each other: [M, W * n]."""
    everything = gather(mine)
    return everything.view(-1, *mine.shape).transpose(0, 1).flatten(1)


@dataclass
class ProbeConfig:
    """k-NN among samples of the training shards, seen in training without their labels, every so often."""

    # The largest share of the run's time that probing may take; 0 turns it off.
    share: float = 0.005
    support: int = 2000
    queries: int = 500
    k: int = 20

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"probe.share must be a share of the time in [0, 1), got {self.share:g}; 0 is off.")
        if min(self.support, self.queries, self.k) < 1:
            raise ValueError(
                "probe.support, probe.queries and probe.k must be at least 1, "
                f"got {self.support}, {self.queries} and {self.k}."
            )


class KNNProbe:
    """Runs the k-NN evaluation when it fits into its share of the time."""

    def __init__(self, config: ProbeConfig, data: LoaderConfig, num_samples: int, classes: int, seed: int) -> None:
        labelled = num_samples if classes else 0
        order = np.random.default_rng(seed).permutation(labelled)[: config.support + config.queries]
        queries = len(order) * config.queries // (config.support + config.queries)
        self._support, self._queries = order[queries:], order[:queries]
        self._config, self._data, self._classes = config, data, classes
        self._last_seconds: float | None = None
        self._last_at = 0.0

    def due(self, elapsed: float, seconds_per_sample: float) -> bool:
        """Return whether one more probe stays within the share. Clocks differ: ask on the main process only."""
        if not self._config.share or min(len(self._queries), len(self._support)) < world_size():
            return False
        # A training step costs more than a forward, so this errs on the late side for the first probe.
        expected = self._last_seconds or seconds_per_sample * (len(self._support) + len(self._queries))
        return expected <= self._config.share * (elapsed - self._last_at)

    def run(self, encoder: ViT, world: World, elapsed: float) -> float:
        """Return the top-1 accuracy; every process must call this together."""
        start = time.monotonic()
        support = extract_share(encoder, self._data, self._support, world)
        queries = extract(encoder, self._data, self._queries, world)
        accuracy = knn_accuracy(support, queries, self._config.k, self._classes)
        self._last_seconds = time.monotonic() - start
        self._last_at = elapsed
        return accuracy
