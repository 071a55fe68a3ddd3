"""What a run is made of, from its config, the same on every process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from data.loader import Loader
from pipeline.checkpoint import Checkpointer, TrainState
from pipeline.compression import Adaptive
from pipeline.config import TrainConfig
from pipeline.distributed import World
from pipeline.engines import build_engine
from pipeline.identity import identity
from pipeline.interplay import check_waiting, whole_from
from pipeline.methods import Method, build_method
from pipeline.models.vit import ViT
from pipeline.probes.knn import KNNProbe
from pipeline.schedules import Budget, Schedules, StepPlan
from pipeline.training_engine import TrainingEngine
from pipeline.tuning import NoTuning, tuner_for


@dataclass(frozen=True)
class Parts:
    """Everything a run is made of."""

    method: Method
    schedules: Schedules
    budget: Budget
    tuner: NoTuning
    loader: Loader
    engine: TrainingEngine
    checkpointer: Checkpointer
    probe: KNNProbe

    def progress(self, state: TrainState) -> float:
        """Return the share of the budget that is spent, the clock of every schedule."""
        return self.budget.progress(steps=state.step, samples=state.samples, cost=state.cost)

    def plans_ahead(self, state: TrainState) -> list[StepPlan]:
        """Return one plan of each shape that the rest of the run has."""
        now = self.progress(state)
        edges = [now, *(p for p in self.schedules.changes() if p > now), 1.0]
        plans = [self.schedules.at((begin + end) / 2) for begin, end in pairwise(edges)]
        return [each for plan in plans for each in self.tuner.reachable(plan)]


def build(config: TrainConfig, world: World) -> Parts:
    """Build the parts of a run from its config, the same on every process.

    Raises:
        ValueError: parts that do not fit together, such as a batch size that the processes cannot share.
    """
    torch.manual_seed(config.seed)
    method = build_method(config.method, ViT(config.model, config.seed))
    schedules = build_schedules(config, method)
    loader = Loader(
        config.data,
        method.views(),
        seed=config.seed,
        batch_size=config.batch_size,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
    )
    check_labels(method, loader.classes)
    tuner = build_tuner(config, schedules, method, world.size)
    engine = build_engine(
        method, config.engine, config.optim, local_batch=config.batch_size // world.size, device=world.device
    )
    return Parts(
        method=method,
        schedules=schedules,
        budget=Budget(config.budget.value, config.budget.unit),
        tuner=tuner,
        loader=loader,
        engine=engine,
        checkpointer=Checkpointer(
            config.directory / "checkpoints",
            config.checkpoint,
            identity(config, loader.manifest.fingerprint, world.size, schedules),
        ),
        probe=KNNProbe(config.probe, config.data, loader.num_samples, len(loader.classes), config.seed),
    )


def check_labels(method: Method, classes: Sequence[str]) -> None:
    """Raise ValueError where a method learns classes and the set has others, or none."""
    if method.classes and method.classes != len(classes):
        has = f"has {len(classes)} classes" if classes else "has no labels"
        raise ValueError(
            f"method.classes must be that of data.shards, which {has}, got {method.classes}; change one of them."
        )


def build_schedules(config: TrainConfig, method: Method) -> Schedules:
    """Return the schedules of a run, every planned shape checked against the model.

    Raises:
        ValueError: a patch size that does not divide the image, a grid without the cell to start with, or layers that
            are to wait for whole images that do not come.
    """
    compression, model = config.compression, config.model
    if isinstance(compression, Adaptive):
        compression = compression.fitted(model.image_size, model.patch_size)
    check_waiting(compression, config.freeze)
    schedules = Schedules(
        rate=config.rate,
        peak_rate=config.rate.peak(config.batch_size),
        weight_decay=config.optim.weight_decay_at,
        compression=compression,
        freeze=config.freeze,
        num_layers=method.encoder.num_layers,
        method=method,
        whole_from=whole_from(compression, model.image_size, model.patch_size),
    )
    for progress in (0.0, *schedules.changes()):
        method.tokens(schedules.at(progress))
    return schedules


def build_tuner(config: TrainConfig, schedules: Schedules, method: Method, processes: int) -> NoTuning:
    """Return what chooses the compression while a run trains, if it is chosen then.

    Raises:
        ValueError: a budget that cannot pay for it, or a batch that cannot be cut for it.
    """
    return tuner_for(
        schedules.compression,
        method,
        unit=config.budget.unit,
        batch_size=config.batch_size,
        processes=processes,
        seed=config.seed,
    )
