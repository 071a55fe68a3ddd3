"""Bias and variance of compressed gradients from running sums over paired sub-batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.distributed import mean_over_ranks, rank, world_size

# Numbers that a gradient is sketched to, for confidence intervals only. Sketches of 128 sub-batches and 30 cells
# take 63 MB.
SKETCH_SIZE = 4096


class Sketch:
    """Project vectors onto a few numbers that keep inner products on average.

    A count sketch (Charikar et al., 2002) whose buckets are taken in turn; exact for vectors no longer than itself.
    """

    def __init__(self, length: int, seed: int, device: torch.device) -> None:
        self._padding = -length % SKETCH_SIZE
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(2, (length,), generator=generator, dtype=torch.int8)
        self._signs = (2 * signs - 1).to(device)

    def __call__(self, vector: Tensor) -> Tensor:
        """Return the sketch [SKETCH_SIZE] of a vector, in fp64 on the CPU."""
        signed = torch.nn.functional.pad(vector * self._signs, (0, self._padding))
        return signed.view(-1, SKETCH_SIZE).sum(0).double().cpu()


@dataclass(frozen=True)
class Moments:
    """What is left of n vectors v_j around their mean m.

    ``total``: ||sum v_j||^2 and ``squares``: the sum of ||v_j||^2, both exact. ``along`` [n]: m . (v_j - m) and
    ``deviations`` [n]: ||v_j - m||^2, both by sketches; only what leaves a vector out needs them.
    """

    total: float
    squares: float
    along: Tensor
    deviations: Tensor

    @property
    def count(self) -> int:
        """Return n."""
        return len(self.along)

    def squared_mean(self) -> float:
        """Return ||m||^2, which is above that of the expectation by variance / n."""
        return self.total / self.count**2

    def squared_expectation(self) -> float:
        """Return an unbiased estimate of ||E v||^2: the mean of v_i . v_j over all i != j. It may be negative."""
        return (self.total - self.squares) / (self.count * (self.count - 1))

    def variance(self) -> float:
        """Return an unbiased estimate of E ||v - E v||^2."""
        return (self.squares - self.total / self.count) / (self.count - 1)

    def squared_expectation_without(self) -> Tensor:
        """Return `squared_expectation` without each vector in turn [n]."""
        rest, mean = self.count - 1, self.squared_mean()
        total = rest**2 * mean - 2 * rest * self.along + self.deviations
        squares = self.squares - mean - 2 * self.along - self.deviations
        return (total - squares) / (rest * (rest - 1))

    def variance_without(self) -> Tensor:
        """Return `variance` without each vector in turn [n]."""
        rest = self.count - 1
        return (rest * self.variance() - self.count / rest * self.deviations) / (rest - 1)


def standard_error(without: Tensor) -> float:
    """Return the jackknife's standard error of a statistic, given its n values without each observation in turn."""
    count = len(without)
    return float(((count - 1) / count * (without - without.mean()).square().sum()).sqrt())


class RunningSum:
    """The sum of one configuration's vectors and of their squares; of each vector itself a sketch is kept.

    Vectors may be this process's slice of the whole: everything kept adds up over slices.
    """

    def __init__(self, length: int, sketch: Sketch, storage: torch.device) -> None:
        self.sum = torch.zeros(length, device=storage)
        self.squares = torch.zeros((), dtype=torch.float64)
        self._sketch = sketch
        self._sketches: list[Tensor] = []

    def add(self, vector: Tensor) -> None:
        """Take in the vector of one more sub-batch."""
        self.sum += vector.to(self.sum.device)
        self.squares += square(vector)
        self._sketches.append(self._sketch(vector))

    def sketches(self) -> Tensor:
        """Return the sketches [n, SKETCH_SIZE]."""
        return torch.stack(self._sketches)


class PairedGradients:
    """Gradients of several configurations against the uncompressed one's of the same sub-batches.

    Holds one vector for each configuration and one more, each on `storage` and as long as this process's slice of the
    gradient. `add` follows `start` for each configuration in turn.
    """

    def __init__(
        self, configurations: int, length: int, *, seed: int, device: torch.device, storage: torch.device
    ) -> None:
        sketch = Sketch(length, seed + rank(), device)
        self._reference = RunningSum(length, sketch, storage)
        self._differences = [RunningSum(length, sketch, storage) for _ in range(configurations)]
        self._squares = torch.zeros(configurations, dtype=torch.float64)
        self._present = torch.empty(0)

    def start(self, reference: Tensor) -> None:
        """Take in the uncompressed gradient of the next sub-batch."""
        self._present = reference
        self._reference.add(reference)

    def add(self, configuration: int, gradient: Tensor) -> None:
        """Take in a configuration's gradient of the present sub-batch."""
        self._differences[configuration].add(gradient - self._present)
        self._squares[configuration] += square(gradient)

    def reference(self) -> Moments:
        """Return the moments of the uncompressed gradient. Every process must call this."""
        return _moments(self._reference.sum, self._reference.squares, self._reference.sketches())

    def differences(self, configuration: int) -> Moments:
        """Return the moments of a configuration's gradient less the uncompressed one. Every process must call this."""
        mine = self._differences[configuration]
        return _moments(mine.sum, mine.squares, mine.sketches())

    def gradients(self, configuration: int) -> Moments:
        """Return the moments of a configuration's gradient itself. Every process must call this."""
        mine = self._differences[configuration]
        return _moments(
            self._reference.sum + mine.sum,
            self._squares[configuration],
            self._reference.sketches() + mine.sketches(),
        )


def _moments(total: Tensor, squares: Tensor, sketches: Tensor) -> Moments:
    """Return the moments of whole vectors, given those of every process's slice."""
    size = world_size()
    norm, squared = (size * float(mean_over_ranks(each)) for each in (square(total), squares))
    sketches = size * mean_over_ranks(sketches)
    mean = sketches.mean(0)
    deviations = (sketches - mean).square().sum(1)
    # What they add up to is known exactly.
    exact = squared - norm / len(sketches)
    return Moments(norm, squared, (sketches - mean) @ mean, deviations * (exact / deviations.sum().clamp(min=1e-300)))


def square(vector: Tensor) -> Tensor:
    """Return ||v||^2, added up in fp64, as a number on the CPU."""
    norm: Tensor = torch.linalg.vector_norm(vector, dtype=torch.float64)
    return norm.square().cpu()
