"""Losses over the global batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.distributed import at_least_fp32, gather, gather_with_gradient, rank


def info_nce(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """Return the contrastive loss of MoCo-v3 for one ordered pair of views (Chen et al., 2021).

    Queries [B, D] are compared with the keys [B, D] of every process; the positive of query i is key i. The
    cross entropy is scaled by 2 tau, so random features give 2 tau ln(global batch). No gradient reaches keys.
    """
    query = F.normalize(at_least_fp32(query), dim=1)
    keys = gather(F.normalize(at_least_fp32(key.detach()), dim=1))
    logits = query @ keys.T / temperature
    return F.cross_entropy(logits, _own_rows(query)) * (2 * temperature)


def nt_xent(one: Tensor, two: Tensor, temperature: float, *, symmetric: bool) -> Tensor:
    """Return the loss of SimCLR (Eq. 1 of Chen et al., 2020), the mean over the anchors.

    Anchors are the first view [B, D], or both. Each is compared with the other view of every process's samples, of
    which its own is the positive, and with all other anchors of its view. Gradients reach every sample on every
    process, so that the mean of the processes' gradients is the gradient of the global batch.
    """
    one, two = (F.normalize(at_least_fp32(each), dim=1) for each in (one, two))
    ones, twos = gather_with_gradient(one), gather_with_gradient(two)
    loss = _nt_xent_of(one, ones, twos, temperature)
    return (loss + _nt_xent_of(two, twos, ones, temperature)) / 2 if symmetric else loss


def _nt_xent_of(anchor: Tensor, anchors: Tensor, others: Tensor, temperature: float) -> Tensor:
    target = _own_rows(anchor)
    among_anchors = (anchor @ anchors.T / temperature).scatter(1, target[:, None], float("-inf"))
    return F.cross_entropy(torch.cat([anchor @ others.T / temperature, among_anchors], 1), target)


def centered_softmax(logits: Tensor, center: Tensor, temperature: float) -> Tensor:
    """Return a teacher's distributions [B, K]: centered against one-hot and sharpened against uniform collapse."""
    return F.softmax((at_least_fp32(logits) - center) / temperature, dim=1)


def distillation(students: Mapping[int, Tensor], targets: Mapping[int, Tensor], temperature: float) -> Tensor:
    """Return DINO's cross entropy (Eq. 1 and 3 of Caron et al., 2021).

    Logits and target distributions [B, K] by the number of their view; the mean runs over all pairs of different views.
    """
    logs = {view: F.log_softmax(at_least_fp32(each) / temperature, dim=1) for view, each in students.items()}
    pairs = [(s, t) for t in targets for s in students if s != t]
    return torch.stack([-(targets[t] * logs[s]).sum(1).mean() for s, t in pairs]).mean()


def _own_rows(local: Tensor) -> Tensor:
    """Return where this process's rows lie in what is gathered."""
    return torch.arange(len(local), device=local.device) + len(local) * rank()
