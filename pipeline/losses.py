"""Losses over the global batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.distributed import at_least_fp32, gather, rank


def info_nce(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """Return the contrastive loss of MoCo-v3 for one ordered pair of views (Chen et al., 2021).

    Queries [B, D] are compared with the keys [B, D] of every process; the positive of query i is key i. The
    cross entropy is scaled by 2 tau, so random features give 2 tau ln(global batch). No gradient reaches keys.
    """
    query = F.normalize(at_least_fp32(query), dim=1)
    keys = gather(F.normalize(at_least_fp32(key.detach()), dim=1))
    logits = query @ keys.T / temperature
    target = torch.arange(len(query), device=query.device) + len(query) * rank()
    return F.cross_entropy(logits, target) * (2 * temperature)
