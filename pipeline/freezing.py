"""Which layers still learn, and how fast: one rate per layer as a function of progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

Decay = Callable[[float, float], float]
"""(progress, end) -> share of the base rate: warm-up, then decay to zero where the clock reaches `end`.

`end` is a share of the post-warm-up part of the run; 1.0 is the end of the run.
"""


# Of the base rate.
LEAST = 1e-12


class Curve(Enum):
    """How freeze times are spread over the layers: t -> t, t^2 or t^3."""

    linear = 1
    square = 2
    cubic = 3


class Warmup(Enum):
    """To which rate a layer whose own is scaled warms up."""

    # Its own, as the paper of ViTFreeze says.
    own = "own"
    # The global one, from which it then jumps to its own, as the published code does.
    shared = "shared"


Times = tuple[float | None, ...]
"""When each layer freezes, first layer first, as a share of the run after warm-up; None is never."""


@dataclass
class FreezeSchedule:
    """When each layer freezes, and its learning rate until then. Stateless."""

    def freeze_times(self, num_layers: int, whole_from: float = 0.0) -> Times:
        """Return the times of all layers; `whole_from`: since when the model has seen whole images, as such a share."""
        raise NotImplementedError

    def rates(self, progress: float, times: Times, decay: Decay, *, warming_up: bool = False) -> tuple[float, ...]:
        """Return the factor of the base learning rate of every layer, first layer first; 0.0 means frozen."""
        factors = (decay(progress, 1.0 if t is None else t) * self.scale(t, warming_up=warming_up) for t in times)
        # At the very end of a run the decay rounds to zero, which would freeze what never does.
        return tuple(max(factor, LEAST) if t is None else factor for factor, t in zip(factors, times, strict=True))

    def scale(self, time: float | None, *, warming_up: bool) -> float:
        """Return by how much a layer that freezes at `time` learns faster than others do."""
        return 1.0


@dataclass
class NoFreeze(FreezeSchedule):
    """Every layer follows the global rate to the end."""

    def freeze_times(self, num_layers: int, whole_from: float = 0.0) -> Times:
        """Return None for each layer."""
        return (None,) * num_layers


@dataclass
class FreezeOut(FreezeSchedule):
    """Freeze layers from the input on, each with a decay of its own (Brock et al., 2017).

    Layer i of n + 1 freezes at t_i = (t0 + (1 - t0) i / n) ^ curve of the run after warm-up, so the last
    one never does. Scaled rates start at 1 / t_i of the base rate.
    """

    t0: float = 0.8
    curve: Curve = Curve.cubic
    # Unscaled by default: the scaling nearly doubles the rate of the first layers, where contrastive
    # pre-training of ViTs is least stable.
    scaled: bool = False
    warmup: Warmup = Warmup.own
    # The share of the run after warm-up for which every layer sees images whole, in the model's own patches and without
    # dropout, before it freezes; those that would freeze earlier wait. Without it nobody waits.
    see_whole: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.t0 <= 1:
            raise ValueError(f"freeze.t0 must be in (0, 1], got {self.t0}; 1 freezes nothing, 0.8 is usual.")
        if self.see_whole is not None and not 0 <= self.see_whole < 1:
            raise ValueError(f"freeze.see_whole must be a share of the run in [0, 1), got {self.see_whole:g}.")

    def freeze_times(self, num_layers: int, whole_from: float = 0.0) -> Times:
        """Return t_i of each layer, None where it is the end of the run.

        Raises:
            ValueError: layers are to wait until the end of the run, or longer.
        """
        last = max(1, num_layers - 1)
        # Written from the end, so that the last is 1 to the bit.
        times = [(1 - (1 - self.t0) * (last - i) / last) ** self.curve.value for i in range(num_layers)]
        earliest = 0.0 if self.see_whole is None else whole_from + self.see_whole
        if earliest >= 1 and self.t0 < 1:
            raise ValueError(
                f"freeze.see_whole={self.see_whole:g}: the compression leaves no layer that much of the run with whole "
                "images, so none would freeze; end the compression earlier, say freeze=none, or leave it out."
            )
        return tuple(t if t < 1 else None for t in (max(t, earliest) for t in times))

    def scale(self, time: float | None, *, warming_up: bool) -> float:
        """Return 1 / t_i if rates are scaled."""
        if not self.scaled or time is None or (warming_up and self.warmup is Warmup.shared):
            return 1.0
        return 1 / time


def frozen_prefix(rates: tuple[float, ...]) -> int:
    """Return the number of leading layers whose rate is zero."""
    for i, rate in enumerate(rates):
        if rate > 0:
            return i
    return len(rates)
