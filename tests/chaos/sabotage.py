"""Defects that a process can be given, to see that the harness notices them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from data.loader import Batch, Loader
from pipeline.methods.dino import DINO


def skip_a_sample() -> None:
    """Go on one sample too late after a resume."""
    batches = Loader.batches

    def late(self: Loader, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        return batches(self, start + (start > 0), stop)

    Loader.batches = late  # type: ignore[method-assign]


def forget_the_momentum_encoder() -> None:
    """Leave it as it is initialized."""
    DINO.load = lambda self, state: None  # type: ignore[method-assign]


SABOTAGES: dict[str, Callable[[], None]] = {
    "skip a sample": skip_a_sample,
    "forget the momentum encoder": forget_the_momentum_encoder,
}
