"""How well a stored order is shuffled: how alike are neighbors, against a random order and a sorted one.

Training mixes samples within windows of shards only, so what lies together in the tars comes together in batches.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NEIGHBORHOOD = 64  # samples; interleaved streams, too, show within it
LEAST_QUALITY = 0.9
_DEVIATIONS = 4.0  # by which chance may exceed its mean


@dataclass(frozen=True)
class ShuffleQuality:
    """The scores of a set, and the mean length of a run of one class, as stored and as expected in a random order."""

    classes: float
    folders: float
    run: float
    random_run: float

    @property
    def score(self) -> float:
        """Return the worse of both: 1.0 = as a random permutation, 0.0 = sorted."""
        return min(self.classes, self.folders)


def measure(labels: NDArray[Any], folders: NDArray[Any]) -> ShuffleQuality:
    """Judge an order by the class and by the source folder of every sample, integers [N] each."""
    share = random_share(labels)
    return ShuffleQuality(
        quality(labels), quality(folders), _run(labels), 1 / (1 - share) if share < 1 else len(labels)
    )


def quality(values: NDArray[Any]) -> float:
    """Return 1.0 if neighbors are alike no more often than by chance, 0.0 if as often as in sorted order.

    In between it counts orders of magnitude: with chance at 1/1000, neighbors alike in one case of ten score 1/3.
    """
    reach = max(1, min(NEIGHBORHOOD, len(values) // 8))
    if len(values) < 2:
        return 1.0
    chance, seen, most = random_share(values), _share(values, reach), _share(np.sort(values), reach)
    noise = _DEVIATIONS * math.sqrt(chance * (1 - chance) / len(values))
    if chance == 0 or seen <= chance + noise or most <= chance + noise:
        return 1.0
    return max(0.0, math.log(most / seen) / math.log(most / chance))


def random_share(values: NDArray[Any]) -> float:
    """Return the probability that two samples drawn at random are alike."""
    _, counts = np.unique(values, return_counts=True)
    return float(np.sum(counts * (counts - 1.0)) / max(1, len(values) * (len(values) - 1)))


def _share(values: NDArray[Any], reach: int) -> float:
    """Return the share of alike pairs among all that lie at most ``reach`` apart."""
    alike = sum(np.count_nonzero(values[step:] == values[:-step]) for step in range(1, reach + 1))
    return float(alike) / (reach * len(values) - reach * (reach + 1) / 2)


def _run(values: NDArray[Any]) -> float:
    """Return the mean length of runs of one value."""
    return len(values) / (1 + np.count_nonzero(values[1:] != values[:-1])) if len(values) else 0.0
