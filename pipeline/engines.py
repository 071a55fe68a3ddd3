"""Which engine a config asks for."""

from __future__ import annotations

import torch

from pipeline.engine import Engine
from pipeline.engine_config import FSDP2, EngineConfig
from pipeline.fsdp_engine import FSDPEngine
from pipeline.methods.base import Method
from pipeline.optim import OptimConfig
from pipeline.training_engine import TrainingEngine


def build_engine(
    method: Method, config: EngineConfig, optim: OptimConfig, *, local_batch: int, device: torch.device
) -> TrainingEngine:
    """Return the engine that takes the steps of a run; `local_batch` is this process's part of a batch.

    Raises:
        ValueError: parts of a batch that would train something else.
    """
    kind = FSDPEngine if isinstance(config, FSDP2) else Engine
    return kind(method, config, optim, local_batch=local_batch, device=device)
