"""Choosing the compression on the live model: gradients measured on training batches, within a share of the budget."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from pipeline.accumulation import parts
from pipeline.analysis.estimators import Moments, PairedGradients, standard_error
from pipeline.analysis.gradients import loss_gradient, slice_length, trainable
from pipeline.checkpoint import TrainState
from pipeline.compression import Compression, CompressionSchedule, FittedAdaptive
from pipeline.compression.adaptive import GridCell
from pipeline.compression.search import Comparison, Move, Search
from pipeline.distributed import from_main, rank, world_size
from pipeline.methods.base import Batch, Method
from pipeline.schedules import StepPlan, Unit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tuned:
    """What tuning did around one step."""

    cost: float = 0.0
    moved: bool = False


@dataclass(frozen=True)
class GradientError:
    """The cost-adjusted mean squared error of a compressed gradient (Eq. 10 of Lin et al., 2024).

    A share of the uncompressed gradient's squared norm; ``without``: the same without each sub-batch in turn [n].
    """

    value: float
    without: list[float]


# Errors of several plans on a batch, against one that is not compressed. Every process must call it.
Measure = Callable[[Batch, StepPlan, Sequence[StepPlan]], list[GradientError]]


class NoTuning:
    """Leaves the compression to its schedule."""

    def plan(self, plan: StepPlan, state: TrainState) -> StepPlan:
        """Return the plan with the compression that the run has chosen."""
        return plan

    def reachable(self, plan: StepPlan) -> list[StepPlan]:
        """Return the plan with every compression that the run may choose."""
        return [plan]

    def tune(self, batch: Batch, plan: StepPlan, state: TrainState) -> Tuned:
        """Measure if it is due, before the step of this batch and plan; the next step may have another compression."""
        return Tuned()


class Tuner(NoTuning):
    """Walks over the grid towards the least cost-adjusted error, cell by cell.

    Measures the present cell and its neighbors, and counts the cost in the budget. Holds nothing that changes: where
    the run stands is in `TrainState.tuning`, and every process does the same.
    """

    def __init__(self, grid: FittedAdaptive, method: Method, batch_size: int, measure: Measure) -> None:
        self._grid, self._method, self._batch_size, self._measure = grid, method, batch_size, measure

    def plan(self, plan: StepPlan, state: TrainState) -> StepPlan:
        """Return the plan with the compression of the present cell."""
        return self._at(plan, Search(self._grid, state.tuning).cell)

    def reachable(self, plan: StepPlan) -> list[StepPlan]:
        """Return the plan with the compression of every cell."""
        return [self._at(plan, cell) for cell in self._grid.grid()]

    def tune(self, batch: Batch, plan: StepPlan, state: TrainState) -> Tuned:
        """Measure if the share of the budget allows it, and move if there is a better neighbor beyond doubt."""
        search = Search(self._grid, state.tuning)
        cells = [search.cell, *self._grid.neighbors(search.cell)]
        reference = _compressed(plan, Compression(), self._method)
        plans = [self._at(plan, cell) for cell in cells]
        cost = self._cost(reference, plans)
        if search.spent + cost > self._grid.share * state.cost:
            return Tuned()
        # One process's numbers for all, lest the last bits of an all-reduce decide otherwise somewhere.
        present, *others = from_main(self._measure(batch, reference, plans))
        seen = {cell: _compare(present, other) for cell, other in zip(cells[1:], others, strict=True)}
        move = search.observe(seen, plan.progress)
        search.spent += cost
        state.cost += cost
        state.tuning = search.numbers()
        if move is not None:
            _announce(move, state, present, seen[move.after])
        return Tuned(cost, move is not None)

    def _at(self, plan: StepPlan, cell: GridCell) -> StepPlan:
        return _compressed(plan, self._grid.compression(cell), self._method)

    def _cost(self, reference: StepPlan, plans: Sequence[StepPlan]) -> float:
        """Return the cost of a measurement; an uncompressed cell comes with the reference."""
        run = [reference, *(plan for plan in plans if plan.query != reference.query)]
        return self._batch_size * sum(self._method.sample_cost(plan) for plan in run)


class LiveErrors:
    """Measures on the model as it trains, leaving no trace in it: the `Measure` of a run.

    The batch is cut into sub-batches, the same for all plans. Contrastive losses and batch norm are then those of the
    smaller batch, for the uncompressed gradient too, so that errors are comparable.
    """

    def __init__(self, method: Method, sub_batches: int, seed: int) -> None:
        self._method, self._sub_batches, self._seed = method, sub_batches, seed
        self._last_layer = [p for p in method.last_layer() if p.requires_grad]

    def __call__(self, batch: Batch, reference: StepPlan, plans: Sequence[StepPlan]) -> list[GradientError]:
        """Return the error of each plan. Every process must call this with its part of the batch."""
        # As the engine will have it in this step; after a resume it has not been told yet.
        for parameter in self._last_layer:
            parameter.requires_grad_(reference.last_layer_rate > 0)
        # Shapes that occur here only are not worth a graph each.
        with torch.compiler.set_stance("force_eager"):
            gradients = self._gradients(batch, reference, plans)
        samples = len(batch.index) * world_size()
        baseline = samples * self._method.sample_cost(reference)
        norms, errors = gradients.reference(), []
        for i, plan in enumerate(plans):
            # The variance of a sample is that of a mean over so many, times their number.
            share = self._method.sample_cost(plan) / baseline * (samples // self._sub_batches)
            errors.append(_error(norms, gradients.differences(i), gradients.gradients(i), share))
        return errors

    def _gradients(self, batch: Batch, reference: StepPlan, plans: Sequence[StepPlan]) -> PairedGradients:
        parameters = trainable(self._method, reference)
        device = parameters[0].device
        # A slice of one gradient for each plan and one more, at a time when there are no activations of a whole batch.
        gradients = PairedGradients(
            len(plans), slice_length(parameters), seed=self._seed, device=device, storage=device
        )
        for part in parts(batch, len(batch.index) // self._sub_batches):
            dense = loss_gradient(self._method, part, reference, parameters)
            gradients.start(dense)
            for i, plan in enumerate(plans):
                same = plan.query == reference.query
                gradients.add(i, dense if same else loss_gradient(self._method, part, plan, parameters))
        return gradients


def tuner_for(
    schedule: CompressionSchedule, method: Method, *, unit: Unit, batch_size: int, processes: int, seed: int
) -> NoTuning:
    """Return what chooses the compression of a run.

    Raises:
        ValueError: the budget does not count cost, or the batch cannot be cut as `schedule` says.
    """
    if not isinstance(schedule, FittedAdaptive):
        return NoTuning()
    if unit is not Unit.cost:
        raise ValueError(
            f"budget.unit must be cost with compression=adaptive, whose measurements it has to pay, got {unit.value}; "
            "say budget.unit=cost, with a budget.value that `coldpress plan` turns into samples."
        )
    number = schedule.sub_batches
    if batch_size % (processes * number) or batch_size < 2 * number:
        raise ValueError(
            f"compression.sub_batches must cut the batch of each process evenly, into at least 2 samples of all "
            f"processes together, got {number} for batch_size={batch_size} and {processes} process(es); "
            f"take a divisor of {batch_size // processes}, or another batch_size."
        )
    return Tuner(schedule, method, batch_size, LiveErrors(method, number, seed))


def _compressed(plan: StepPlan, query: Compression, method: Method) -> StepPlan:
    return replace(plan, query=query, key=method.key_compression(query))


def _error(reference: Moments, differences: Moments, gradients: Moments, share: float) -> GradientError:
    """Return squared bias plus `share` of the variance, over the squared norm of the mean uncompressed gradient.

    That norm is divided by as in Figure 4 of Lin et al., 2024: gradients shrink during a run, and what is known of
    earlier steps must not weigh more for it.
    """
    scale = reference.squared_mean()
    value = differences.squared_expectation() + share * gradients.variance()
    without = differences.squared_expectation_without() + share * gradients.variance_without()
    return GradientError(value / scale, (without / scale).tolist())


def _compare(present: GradientError, other: GradientError) -> Comparison:
    without = torch.tensor([other.without, present.without], dtype=torch.float64)
    return Comparison(other.value - present.value, standard_error(without[0] - without[1]))


def _announce(move: Move, state: TrainState, present: GradientError, now: Comparison) -> None:
    if rank() != 0:
        return
    log.info(
        "step %d: compression moves from patches of %d and dropout %g to patches of %d and dropout %g, whose "
        "cost-adjusted error is %.3g +- %.2g below the present %.3g (in the last measurement %.3g +- %.2g), in squared "
        "norms of the gradient",
        state.step,
        *move.before,
        *move.after,
        -move.reason.difference,
        move.reason.error,
        present.value,
        -now.difference,
        now.error,
    )
