"""What a run, an evaluation, a benchmark and a demo can be told, and one table of the groups to choose from."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from data.loader import LoaderConfig
from monitoring.sinks import MonitorConfig
from pipeline.analysis.selection import SelectionConfig
from pipeline.checkpoint import CheckpointConfig
from pipeline.compression import Adaptive, CompressionSchedule, Constant, NoCompression, Staged
from pipeline.compression.base import check_divides
from pipeline.engine_config import FSDP2, SHARDED, EngineConfig, Zero0, Zero2, Zero3
from pipeline.freezing import FreezeOut, FreezeSchedule, NoFreeze
from pipeline.methods import (
    DINOConfig,
    FineTuneDeiTConfig,
    FineTuneLocalMIMConfig,
    FineTuneMAEConfig,
    LocalMIMConfig,
    MoCoConfig,
    SimCLRConfig,
)
from pipeline.models.vit import ViTConfig
from pipeline.optim import OptimConfig
from pipeline.probes.knn import ProbeConfig
from pipeline.scaling import ClusterConfig
from pipeline.schedules import BudgetConfig, RateConfig
from pipeline.watchdog import WatchdogConfig


@dataclass
class TrainConfig:
    """One pre-training run."""

    # The run's name; everything it writes is below runs/run.
    run: str = MISSING
    runs: str = "runs"
    # auto goes on from the newest valid checkpoint of this run; never starts anew.
    resume: str = "auto"
    # Delete what an earlier run of this name left.
    overwrite: bool = False
    seed: int = 0
    # Global: the sum over all processes.
    batch_size: int = 256
    log_every: int = 10
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    data: LoaderConfig = field(default_factory=LoaderConfig)
    model: ViTConfig = field(default_factory=ViTConfig)
    method: Any = MISSING
    compression: CompressionSchedule = MISSING
    freeze: FreezeSchedule = MISSING
    rate: RateConfig = field(default_factory=RateConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)

    def __post_init__(self) -> None:
        if not 0 < self.budget.value < math.inf:
            raise ValueError(
                f"budget.value must be above 0, got {self.budget.value:g}; "
                "say for instance budget.value=1000 budget.unit=steps."
            )
        if self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2 to have negatives, got {self.batch_size}.")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}.")
        if self.log_every < 1:
            raise ValueError(f"log_every must be at least 1 step, got {self.log_every}.")
        if self.resume not in ("auto", "never"):
            raise ValueError(f"resume must be auto or never, got {self.resume}.")
        if not self.run or Path(self.run).name != self.run:
            raise ValueError(f"run must be a plain name without slashes, got {self.run!r}; use runs=DIR for the place.")
        for path, cell in self.compression.cells().items():
            cell.check_fits(path, self.model.image_size, self.model.patch_size)
        if self.engine.stage == SHARDED:
            self._check_sharded()

    def _check_sharded(self) -> None:
        if isinstance(self.compression, Adaptive):
            raise ValueError(
                f"compression=adaptive measures on whole weights, of which engine={_name(self.engine)} leaves each "
                "process a part; take engine=zero2, or compression=staged."
            )
        _check_compiles(self.engine, self.model)

    @property
    def directory(self) -> Path:
        """Return the run's own directory."""
        return Path(self.runs) / self.run


@dataclass
class PlanConfig(TrainConfig):
    """A pre-training run to look at, and what only its planner knows."""

    # Images of an epoch, for sets that are not sharded yet; 0 asks the shards, where they are named.
    epoch_size: int = 0
    # Units of cost a second on one GPU, as measured: a run's coldpress_cost_per_second over its GPUs. 0: no hours.
    cost_per_gpu_second: float = 0.0
    gpus: int = 1
    # Numbers of GPUs to say how a step would scale over, by a model of the cluster; none by default.
    ranks: list[int] = field(default_factory=list)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(1 <= each <= self.batch_size for each in self.ranks):
            raise ValueError(
                f"ranks must be numbers of GPUs from 1 to batch_size={self.batch_size}, got {self.ranks}; "
                "each takes at least one sample of a batch."
            )
        if self.epoch_size < 0:
            raise ValueError(f"epoch_size must be a number of images, got {self.epoch_size}; 0 asks the shards.")
        if not 0 <= self.cost_per_gpu_second < math.inf:
            raise ValueError(
                f"cost_per_gpu_second must be at least 0, got {self.cost_per_gpu_second:g}; 0 leaves the hours out."
            )
        if self.gpus < 1:
            raise ValueError(f"gpus must be at least 1, got {self.gpus}.")


@dataclass
class DoctorConfig(TrainConfig):
    """A pre-training run to try before it is started; without data.shards, the machine alone."""

    run: str = "doctor"
    # Only stages count here, and a budget without them is as good as any.
    budget: BudgetConfig = field(default_factory=lambda: BudgetConfig(1000))
    # Samples that each process reads and holds against their checksums.
    samples: int = 256
    # Leave out what takes longer than reading: batches, steps and a checkpoint.
    quick: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}; 256 is usual.")


@dataclass
class AnalyzeConfig:
    """Gradient-error analysis of one run's checkpoints."""

    run: str = MISSING
    runs: str = "runs"
    # Shares of the run's budget; the checkpoints nearest to them are analyzed, 0 is the untrained model.
    points: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    # The grid. Without patch sizes: from the model's own to three times it, those that divide the image.
    patch_sizes: list[int] = field(default_factory=list)
    dropouts: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 0.9])
    samples: int = 16384
    # Of so many samples each gradient is made: the loss has their negatives, and heads their batch statistics.
    sub_batch: int = 256
    # Of equation 10, in units of cost; 0 is the cost of one uncompressed batch of the run.
    budget: float = 0.0
    # Which samples, and how they are augmented.
    seed: int = 0
    # Cells of one pass over the samples; fewer need less memory, lose less when stopped and take longer. 0 takes all.
    cells_at_once: int = 0
    # Where the run's shards are today; empty: where they were.
    shards: str = ""
    selection: SelectionConfig = field(default_factory=SelectionConfig)

    def __post_init__(self) -> None:
        if not self.points or not all(0 <= point <= 1 for point in self.points):
            raise ValueError(f"points must be shares of the budget in [0, 1], got {self.points}.")
        if self.sub_batch < 2 or self.samples % self.sub_batch or self.samples < 4 * self.sub_batch:
            raise ValueError(
                "samples must be a multiple of sub_batch, at least 4 of them, and sub_batch at least 2; "
                f"got {self.samples} and {self.sub_batch}."
            )
        if not 0 <= self.budget < math.inf:
            raise ValueError(f"budget must not be negative, got {self.budget:g}; 0 is one uncompressed batch.")
        if self.cells_at_once < 0 or self.seed < 0:
            raise ValueError(
                f"cells_at_once and seed must not be negative, got {self.cells_at_once} and {self.seed}; "
                "cells_at_once=0 takes all."
            )


@dataclass
class BenchConfig:
    """Measurements against a baseline in the same run."""

    # step: over compressions; loop: against a plain PyTorch loop; freezing: over frozen layers; scale: over processes;
    # targets: LocalMIM's, one pass against many; loader: images per CPU second; start: time to the index; checkpoint:
    # saves, against DeepSpeed's own, and a resume; monitoring: what it takes of a step; all: one after the other.
    what: str = "step"
    batch_size: int = 64
    rounds: int = 7
    model: ViTConfig = field(default_factory=ViTConfig)
    method: Any = MISSING
    rate: RateConfig = field(default_factory=RateConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    patch_sizes: list[int] = field(default_factory=list)
    dropouts: list[float] = field(default_factory=lambda: [0.0, 0.5])
    # TFLOPS that the device could reach, for its utilization; 0 asks a table of GPUs.
    peak_teraflops: float = 0.0
    # Of what=loader: the set, whose views to make, and images of a round (rounded up to batches). Of step and loop: the
    # set to train on, too.
    data: LoaderConfig = field(default_factory=LoaderConfig)
    methods: list[str] = field(default_factory=lambda: ["moco", "simclr", "dino", "localmim"])
    images: int = 128
    # What the model eats; the loader's benchmark says how many cores that takes.
    samples_per_second: float = 1000.0
    # Of what=scale: numbers of processes, which the command starts itself, and the batch of the first of them.
    ranks: list[int] = field(default_factory=lambda: [1, 2])
    # JSON with every round, and a picture beside it.
    output: str = ""
    # An earlier output of the same settings and machine: what is worse beyond both spreads makes the exit code 1.
    compare: str = ""

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.batch_size < 2:
            raise ValueError(
                f"rounds and batch_size must be at least 1 and 2, got {self.rounds} and {self.batch_size}."
            )
        if self.images < 1:
            raise ValueError(f"images must be at least 1, got {self.images}; 128 is usual.")
        if not self.dropouts or not all(0 <= dropout < 1 for dropout in self.dropouts):
            raise ValueError(f"dropouts must list shares in [0, 1), got {self.dropouts}; 0 keeps every token.")
        for size in self.patch_sizes:
            if size < 1:
                raise ValueError(
                    f"patch_sizes must be numbers of pixels, got {self.patch_sizes}; [] is the model's own."
                )
            check_divides("patch_sizes", size, self.model.image_size, self.model.patch_size)
        if not 0 < self.samples_per_second < math.inf:
            raise ValueError(f"samples_per_second must be above 0, got {self.samples_per_second:g}.")
        if not 0 <= self.peak_teraflops < math.inf:
            raise ValueError(
                f"peak_teraflops must be at least 0, got {self.peak_teraflops:g}; 0 takes that of known GPUs."
            )
        if not self.ranks or any(each < 1 for each in self.ranks):
            raise ValueError(f"ranks must be numbers of processes, got {self.ranks}; [1,2] is usual.")
        _check_compiles(self.engine, self.model)


def _check_compiles(engine: EngineConfig, model: ViTConfig) -> None:
    if model.compile and engine.stage == SHARDED:
        raise ValueError(
            f"model.compile must be false with engine={_name(engine)}, whose gathers break every graph; "
            "take engine=zero2, or leave model.compile out."
        )


def _name(engine: EngineConfig) -> str:
    return "fsdp2" if isinstance(engine, FSDP2) else f"zero{engine.stage}"


# group -> option -> config. A new method, compression schedule or freeze rule is one line here.
GROUPS: dict[str, dict[str, type[Any]]] = {
    "method": {
        "moco": MoCoConfig,
        "simclr": SimCLRConfig,
        "dino": DINOConfig,
        "localmim": LocalMIMConfig,
        "finetune_deit": FineTuneDeiTConfig,
        "finetune_mae": FineTuneMAEConfig,
        "finetune_localmim": FineTuneLocalMIMConfig,
    },
    "compression": {"none": NoCompression, "constant": Constant, "staged": Staged, "adaptive": Adaptive},
    "freeze": {"none": NoFreeze, "freezeout": FreezeOut},
    "engine": {"zero0": Zero0, "zero1": EngineConfig, "zero2": Zero2, "zero3": Zero3, "fsdp2": FSDP2},
}
