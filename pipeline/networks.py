"""The networks of a run as a checkpoint has them, or as they were before the first step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from pipeline import engine_state
from pipeline.config import TrainConfig
from pipeline.methods import Method, build_method
from pipeline.models.vit import ViT
from pipeline.pieces import Reader


def imagine(training: TrainConfig) -> Method:
    """Return a run's method with shapes but no weights, which takes no memory."""
    with torch.device("meta"):
        return build_method(training.method, ViT(replace(training.model, weights=""), training.seed))


def networks(training: TrainConfig, checkpoint: Path | None) -> Method:
    """Return a run's method with the weights of a checkpoint, on the CPU; None means untrained."""
    torch.manual_seed(training.seed)
    # A checkpoint has all weights: those that the run started from may be gone by now.
    model = training.model if checkpoint is None else replace(training.model, weights="")
    method = build_method(training.method, ViT(model, training.seed))
    if checkpoint is not None:
        engine_state.load_networks(method, Reader(checkpoint))
    return method
