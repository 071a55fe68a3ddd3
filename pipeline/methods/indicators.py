"""Numbers that tell a representation that spreads from one that collapses."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.distributed import at_least_fp32


@torch.no_grad()
def spread(features: Tensor) -> dict[str, Tensor]:
    """Return the standard deviation and the effective rank of features [B, D] of this process's part of the batch.

    ``feature_std``: mean over dimensions of the standard deviation of normalized features, times sqrt(D); 1 for
    directions that are uniform on the sphere, 0 for equal ones. ``effective_rank``: participation ratio of the
    eigenvalues of their covariance, (sum l)^2 / sum l^2, between 1 and min(B - 1, D), 0 for equal features; it needs no
    decomposition.
    """
    unit = F.normalize(at_least_fp32(features), dim=1)
    centered = unit - unit.mean(0)
    variances = centered.square().mean(0)
    # The nonzero eigenvalues of both products are the same.
    gram = centered @ centered.T if len(unit) < unit.shape[1] else centered.T @ centered
    trace = gram.diagonal().sum()
    return {
        "feature_std": variances.sqrt().mean() * unit.shape[1] ** 0.5,
        "effective_rank": trace.square() / gram.square().sum().clamp_min(torch.finfo(gram.dtype).tiny),
    }


@torch.no_grad()
def entropy_ratio(probabilities: Tensor) -> Tensor:
    """Return the mean entropy of distributions [B, K] over that of the uniform one: 1 says nothing, 0 is one-hot."""
    entropy: Tensor = torch.special.entr(probabilities).sum(1).mean()
    return entropy / math.log(probabilities.shape[1])
