"""The networks of a run as a checkpoint has them, or as they were before the first step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from pipeline import engine_state
from pipeline.config import TrainConfig
from pipeline.methods import Method, build_method
from pipeline.models.vit import ViT
from pipeline.pieces import Reader


def imagine(training: TrainConfig) -> Method:
    """Return a run's method with shapes but no weights, which takes no memory."""
    with torch.device("meta"):
        return build_method(training.method, ViT(replace(training.model, weights=""), training.seed))


# The one whose features are evaluated is one of the other two.
REPRESENTATION, ONLINE, MOMENTUM = "representation", "online", "momentum"
ENCODERS = (REPRESENTATION, ONLINE, MOMENTUM)


def networks(training: TrainConfig, checkpoint: Path | None) -> Method:
    """Return a run's method with the weights of a checkpoint, on the CPU; None means untrained."""
    torch.manual_seed(training.seed)
    # A checkpoint has all weights: those that the run started from may be gone by now.
    model = training.model if checkpoint is None else replace(training.model, weights="")
    method = build_method(training.method, ViT(model, training.seed))
    if checkpoint is not None:
        engine_state.load_networks(method, Reader(checkpoint))
    return method


def encoder_of(method: Method, which: str) -> ViT:
    """Return an encoder of a method by one of the names in `ENCODERS`.

    Raises:
        ValueError: the method has no such encoder.
    """
    found = {REPRESENTATION: method.representation, ONLINE: method.encoder}
    for average in method.momentum_encoders():
        assert isinstance(average.network, nn.ModuleDict)
        network = average.network["encoder"]
        assert isinstance(network, ViT)
        found[MOMENTUM] = network
    if which not in found:
        raise ValueError(
            f"encoder={which}: {type(method).__name__} keeps no such encoder; choose from {', '.join(found)}."
        )
    return found[which]
