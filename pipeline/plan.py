"""Command: what a training run would do and cost, stage by stage. Runs nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from data.manifest import Manifest
from pipeline.compression import FittedAdaptive, NoCompression
from pipeline.config import PlanConfig, TrainConfig
from pipeline.freezing import NoFreeze
from pipeline.interplay import warn_of_early_freezing
from pipeline.methods import Method
from pipeline.networks import imagine
from pipeline.parts import build_schedules, build_tuner
from pipeline.plots import schedule_picture
from pipeline.scaling import scaled_steps, scaling_table
from pipeline.schedules import Schedules, StepPlan, Unit
from pipeline.tuning import NoTuning


@dataclass(frozen=True)
class StageRow:
    """One stretch of a run in which every step has the same shape."""

    begin: float
    end: float
    plan: StepPlan
    cost: float
    nominal_cost: float
    samples: float


def run(config: PlanConfig) -> None:
    """Print the stages of a run and what its budget buys, and draw its schedules."""
    method = imagine(config)
    schedules = build_schedules(config, method)
    warn_of_early_freezing(schedules)
    tuner = build_tuner(config, schedules, method, processes=1)
    rows = stages(config, schedules, method)
    print(_table(rows, method))
    if isinstance(schedules.compression, FittedAdaptive):
        print(_choice(tuner, schedules, method))
    print(_totals(config, rows, uncompressed_cost(schedules, method)))
    if config.ranks:
        print(_scaling(config, rows, method))
    picture = config.directory.with_name(config.directory.name + "-plan.png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    schedule_picture(schedules, method, picture)
    print(f"schedule picture: {picture}")


def stages(config: TrainConfig, schedules: Schedules, method: Method) -> list[StageRow]:
    """Return the run cut where the shape of a step changes, with the samples that each piece lasts."""
    edges = [0.0, *schedules.changes(), 1.0]
    rows = []
    for begin, end in pairwise(edges):
        plan = schedules.at((begin + end) / 2)
        cost = method.sample_cost(plan)
        samples = _samples(config, config.budget.value * (end - begin), cost)
        rows.append(StageRow(begin, end, plan, cost, method.nominal_sample_cost(plan), samples))
    return rows


def uncompressed_cost(schedules: Schedules, method: Method) -> float:
    """Return the cost of a sample without compression and freezing."""
    return method.sample_cost(replace(schedules, compression=NoCompression(), freeze=NoFreeze()).at(0.0))


def _samples(config: TrainConfig, budget: float, cost: float) -> float:
    """Return how many samples a piece of the budget buys at a cost each."""
    if config.budget.unit is Unit.steps:
        return budget * config.batch_size
    return budget if config.budget.unit is Unit.samples else budget / cost


def _table(rows: list[StageRow], method: Method) -> str:
    size = (method.encoder.config.image_size, method.encoder.config.patch_size)
    header = "progress        patch  dropout  tokens q/k  cost/sample  paper's  frozen layers      samples"
    lines = [header]
    for row in rows:
        patches = row.plan.query.num_patches(*size)
        query, key = method.lengths(row.plan)
        lines.append(
            f"{row.begin:6.1%} - {row.end:6.1%}"
            f"{row.plan.query.patch_size(size[1]):6d}"
            f"{1 - row.plan.query.keep(patches) / patches:9.3f}"
            f"{query:7d}/{key:<4d}"
            f"{row.cost:12.4f}"
            f"{row.nominal_cost:9.4f}"
            f"{row.plan.frozen_layers:9d} of {len(row.plan.layer_rates):<3d}"
            f"{row.samples:13,.0f}"
        )
    return "\n".join(lines)


def _choice(tuner: NoTuning, schedules: Schedules, method: Method) -> str:
    """Return what a run will choose from, and that what stands above it is where it starts."""
    costs = [method.sample_cost(plan) for plan in tuner.reachable(schedules.at(0.0))]
    return (
        f"adaptive: chosen while training from {len(costs)} compressions of {min(costs):.4f} to {max(costs):.4f} "
        "a sample; the plan is that of the first"
    )


def _totals(config: PlanConfig, rows: list[StageRow], dense: float) -> str:
    samples = sum(row.samples for row in rows)
    cost = sum(row.samples * row.cost for row in rows)
    nominal = sum(row.samples * row.nominal_cost for row in rows)
    epoch = _epoch_size(config)
    lines = [
        f"budget: {config.budget.value:,.10g} {config.budget.unit.value}",
        f"as planned:   {_amount(samples, config.batch_size, epoch)}",
        f"cost:         {cost:,.0f} units by real tokens, {nominal:,.0f} by the paper's formula",
        f"uncompressed: {_amount(cost / dense, config.batch_size, epoch)} for the same cost "
        f"({dense:.4f} a sample), {samples * dense / cost:.2f}x the cost for the same samples",
    ]
    return "\n".join(lines + ([_time(config, cost)] if config.cost_per_gpu_second else []))


def _scaling(config: PlanConfig, rows: list[StageRow], method: Method) -> str:
    """Return how the dearest and the cheapest step of the run would scale."""
    plans = {plan.query: plan for plan in (max(rows, key=_cost).plan, min(rows, key=_cost).plan)}
    tables = []
    for plan in plans.values():
        steps = scaled_steps(
            method, plan, config.engine, config.cluster, batch_size=config.batch_size, ranks=config.ranks
        )
        tables.append(scaling_table(method, plan, steps))
    return "\n".join([*tables, config.cluster.assumptions()])


def _cost(row: StageRow) -> float:
    return row.cost


def _time(config: PlanConfig, cost: float) -> str:
    rate = config.cost_per_gpu_second
    hours = cost / rate / 3600
    total = f"{hours:,.1f} GPU hours at {rate:,.6g} units/s a GPU"
    return f"time:         {total}, {hours / config.gpus:,.1f} h on {config.gpus}"


def _amount(samples: float, batch_size: int, epoch: int) -> str:
    epochs = f" = {samples / epoch:,.2f} epochs of {epoch:,}" if epoch else ""
    return f"{samples:,.0f} samples = {samples / batch_size:,.0f} steps of {batch_size}{epochs}"


def _epoch_size(config: PlanConfig) -> int:
    """Return the images of an epoch, 0 where nobody knows them."""
    if config.epoch_size or not config.data.shards:
        return config.epoch_size
    return Manifest.load(Path(config.data.shards)).samples
