"""What makes a run the same run: a checkpoint is resumed only by a configuration that shares it."""

from __future__ import annotations

from data import order
from pipeline.compression import Adaptive
from pipeline.config import TrainConfig
from pipeline.freezing import FreezeOut
from pipeline.schedules import Schedules


def identity(config: TrainConfig, shards: str, processes: int, schedules: Schedules) -> dict[str, object]:
    """Return what a resumed run must share with the run that saved, by dotted key."""
    values: dict[str, object] = {
        "seed": config.seed,
        "batch_size": config.batch_size,
        "data.shards": shards,
        "data.color": config.data.color,
        "data.held_out": config.data.held_out,
        "data.order": order.VERSION,
        "engine.precision": config.engine.precision.value,
        # Steps of the optimizer are counted by group; and its moments are averages by these.
        "optim.decay_vectors": config.optim.decay_vectors,
        "optim.betas": str(config.optim.betas),
        # Another budget would take progress back and wake frozen layers.
        "budget.value": config.budget.value,
        "budget.unit": config.budget.unit.value,
    }
    # What moves freeze times would wake frozen layers, too.
    if schedules.freezes():
        values["rate.warmup"] = config.rate.warmup
    if isinstance(config.freeze, FreezeOut) and config.freeze.see_whole is not None:
        values["compression"] = f"whole images from {schedules.whole_from:.4g} of the budget"
    # Another grid or rule would read the saved evidence otherwise. Other schedules may change, and take over.
    if isinstance(config.compression, Adaptive):
        values |= {f"compression.{key}": str(value) for key, value in vars(config.compression).items()}
        # Each cuts its own part of a batch into sub-batches.
        values["processes"] = processes
    for section, part in (("model", config.model), ("method", config.method), ("freeze", config.freeze)):
        values |= {section: type(part).__name__}
        values |= {f"{section}.{key}": str(value) for key, value in vars(part).items()}
    # How blocks run, and where training started: a checkpoint does not depend on them.
    for key in ("model.compile", "model.weights"):
        del values[key]
    return values
