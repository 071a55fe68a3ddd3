"""A batch in parts whose gradients add up to its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.methods.base import Batch, Method, StepOutput


@dataclass(frozen=True)
class Part:
    """Some samples of a batch."""

    views: tuple[Tensor, ...]
    labels: Tensor | None
    index: Tensor


def parts(batch: Batch, size: int) -> list[Batch]:
    """Return a batch in parts of so many samples; 0 takes all.

    Part p of P has every P-th sample, as process r of R has every R-th: a sample and that half a batch further are
    half a part apart, so that what mixes these two mixes the same ones in any parts.
    """
    if not size:
        return [batch]
    number = len(batch.index) // size
    return [_part(batch, slice(p, None, number)) for p in range(number)]


def _part(batch: Batch, which: slice) -> Part:
    labels = None if batch.labels is None else batch.labels[which]
    return Part(tuple(view[which] for view in batch.views), labels, batch.index[which])


def mean(outputs: list[StepOutput]) -> StepOutput:
    """Return the output of a batch whose parts are equally large."""
    if len(outputs) == 1:
        return outputs[0]

    def mean_of(name: str) -> dict[str, Tensor]:
        each = [getattr(output, name) for output in outputs]
        return {key: torch.stack([one[key] for one in each]).mean(0) for key in each[0]}

    loss = torch.stack([output.loss.detach() for output in outputs]).mean()
    return StepOutput(loss, mean_of("metrics"), mean_of("pending"))


def check(size: int, local_batch: int, method: Method) -> None:
    """Refuse parts that would train something else.

    Raises:
        ValueError: the size does not divide the batch, or the loss is no mean over parts.
    """
    if size and local_batch % size:
        raise ValueError(
            f"engine.micro_batch must divide the {local_batch} samples that each process takes of a batch, got {size}; "
            "take a divisor, or 0 for all at once."
        )
    together = size or local_batch
    if together % method.multiple:
        raise ValueError(
            f"{'engine.micro_batch' if size else 'batch_size'} must give the networks a multiple of {method.multiple} "
            f"samples at once, which {type(method).__name__} mixes, got {together}; take another size."
        )
    if size and size < local_batch and method.whole_batch:
        raise ValueError(
            f"engine.micro_batch must be 0 with {type(method).__name__}: {method.whole_batch}, and smaller ones would "
            f"train something else; got {size}. Take more processes, or engine=zero2 or zero3, for less memory."
        )
