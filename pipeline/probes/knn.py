"""Weighted k-nearest-neighbor classification, and the probe that runs it during training."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.loader import LoaderConfig
from pipeline.distributed import World, world_size
from pipeline.models.vit import ViT
from pipeline.probes.features import extract

TEMPERATURE = 0.07
CHUNK = 1024


def knn_accuracy(support: Tensor, support_labels: Tensor, query: Tensor, query_labels: Tensor, k: int) -> float:
    """Return the top-1 accuracy of weighted k-NN with cosine similarity.

    Each of the k nearest support features [N, D] votes exp(similarity / 0.07) for its label (Wu et al., 2018;
    the protocol of Caron et al., 2021). Queries [M, D] are taken in chunks.
    """
    support = F.normalize(support, dim=1)
    classes = int(support_labels.max()) + 1
    hits = 0
    for features, labels in zip(torch.split(query, CHUNK), torch.split(query_labels, CHUNK), strict=True):
        similarity, nearest = (F.normalize(features, dim=1) @ support.T).topk(min(k, len(support)))
        votes = torch.zeros(len(features), classes, device=features.device)
        votes.scatter_add_(1, support_labels[nearest], (similarity / TEMPERATURE).exp())
        hits += int((votes.argmax(1) == labels).sum())
    return hits / len(query)


@dataclass
class ProbeConfig:
    """k-NN among samples of the training shards, seen in training without their labels, every so often."""

    # The largest share of the run's time that probing may take; 0 turns it off.
    share: float = 0.03
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

    def __init__(self, config: ProbeConfig, data: LoaderConfig, num_samples: int, seed: int) -> None:
        order = np.random.default_rng(seed).permutation(num_samples)[: config.support + config.queries]
        queries = len(order) * config.queries // (config.support + config.queries)
        self._support, self._queries = order[queries:], order[:queries]
        self._config, self._data = config, data
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
        support = extract(encoder, self._data, self._support, world)
        queries = extract(encoder, self._data, self._queries, world)
        accuracy = knn_accuracy(*support, *queries, self._config.k)
        self._last_seconds = time.monotonic() - start
        self._last_at = elapsed
        return accuracy
