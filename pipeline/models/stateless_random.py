"""Random choices as pure functions of the sample: the same on any device, on any number of ranks, after a resume."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def random_subset(index: Tensor, num_tokens: int, keep: int, seed: int, stream: int | Tensor) -> Tensor:
    """Choose `keep` of `num_tokens` uniformly for each sample, as [B, keep] token numbers in rising order.

    A pure function of (seed, stream, global sample index). `stream`, one number or one for each sample [B], tells
    the views of a sample apart.
    """
    token = torch.arange(num_tokens, device=index.device)
    return _words(index, token, seed, stream).argsort(dim=1)[:, :keep].sort(dim=1).values


def residual_scales(index: Tensor, rate: float, depth: int, seed: int, stream: int | Tensor) -> Tensor:
    """Return fp32 factors [depth, 2, B] for both residual branches of each block: stochastic depth, per sample.

    Block i drops a branch, factor 0, at rate * i / (depth - 1) (Huang et al., 2016); kept ones are scaled so that the
    expectation is 1. A pure function of (seed, stream, global sample index, block, branch).
    """
    # Tokens are counted from 0 up, branches from -1 down: no two choices come from one word.
    uniform = uniforms(index, -1 - torch.arange(2 * depth, device=index.device), seed, stream)
    keep = 1 - torch.linspace(0, rate, depth, dtype=torch.float64, device=index.device).repeat_interleave(2)
    return ((uniform < keep) / keep).T.reshape(depth, 2, -1).float()


def uniforms(index: Tensor, number: Tensor, seed: int, stream: int | Tensor) -> Tensor:
    """Draw fp64 numbers in [0, 1) for samples [B] and numbers [n]: [B, n]."""
    words = _words(index, number, seed, stream)
    return ((words >> 11) & ((1 << 53) - 1)).double() / 2**53


def normals(index: Tensor, count: int, seed: int, stream: int | Tensor) -> Tensor:
    """Draw fp32 normal numbers for samples [B]: [B, count]; two come from each word, 32 bits for radius and angle."""
    words = _words(index, torch.arange(-(-count // 2), device=index.device), seed, stream)
    high, low = ((part & (2**32 - 1)).float() / 2**32 for part in (words >> 32, words))
    radius, angle = (-2 * (1 - high).clamp_min(2**-25).log()).sqrt(), 2 * math.pi * low
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :count]


def _words(index: Tensor, number: Tensor, seed: int, stream: int | Tensor) -> Tensor:
    """Hash samples [B] and numbers [n] to 64 random bits each, [B, n]."""
    column = stream[:, None] if isinstance(stream, Tensor) else stream
    word = (index[:, None] * -7046029254386353131 + seed) ^ _mix(number * 2862933555777941757 + column + 1)
    return _mix(_mix(word))


def _mix(word: Tensor) -> Tensor:
    # The finalizer of splitmix64. int64 products wrap around; the shifts must be logical.
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        word = (word ^ ((word >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return word ^ ((word >> 31) & ((1 << 33) - 1))
