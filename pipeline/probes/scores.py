"""How well samples were classified."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.distributed import sum_tensor

# Of a normal distribution: 95 % lie within.
QUANTILE = 1.959964
MOST = 5


@dataclass(frozen=True)
class Scores:
    """Hits by class: how many samples [C] there were, and of how many the label was first, or among the first five."""

    samples: Tensor
    first: Tensor
    among_five: Tensor

    @staticmethod
    def of(ranking: Tensor, labels: Tensor, classes: int) -> Scores:
        """Count, for rankings of classes [M, at least 1], best first, and labels [M]; those below 0 do not count."""
        ranking, labels = ranking[labels >= 0], labels[labels >= 0]
        hits = ranking[:, :MOST] == labels[:, None]

        def by_class(which: Tensor) -> Tensor:
            return torch.bincount(labels[which], minlength=classes).cpu()

        return Scores(by_class(labels >= 0), by_class(hits[:, 0]), by_class(hits.any(1)))

    @staticmethod
    def none(classes: int) -> Scores:
        """Return those of no samples."""
        zeros = torch.zeros(classes, dtype=torch.int64)
        return Scores(zeros, zeros, zeros)

    def __add__(self, other: Scores) -> Scores:
        return Scores(self.samples + other.samples, self.first + other.first, self.among_five + other.among_five)

    def of_all_ranks(self) -> Scores:
        """Return the sum over all processes. Every process must call this."""
        return Scores(*(sum_tensor(each) for each in (self.samples, self.first, self.among_five)))

    @property
    def top1(self) -> float:
        """Return the share of the samples whose label came first."""
        return float(self.first.sum() / self.samples.sum())

    @property
    def top5(self) -> float:
        """Return the share of the samples whose label was among the first five."""
        return float(self.among_five.sum() / self.samples.sum())

    @property
    def per_class(self) -> list[float | None]:
        """Return `top1` of each class, None of one without samples."""
        pairs = zip(self.first.tolist(), self.samples.tolist(), strict=True)
        return [hits / samples if samples else None for hits, samples in pairs]

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % confidence interval of `top1` over samples drawn at random (Wilson, 1927)."""
        n, p, z = int(self.samples.sum()), self.top1, QUANTILE
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return middle - half, middle + half
