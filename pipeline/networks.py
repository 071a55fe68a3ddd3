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

# The one whose features are evaluated is one of the other two.
REPRESENTATION, ONLINE, MOMENTUM = "representation", "online", "momentum"
ENCODERS = (REPRESENTATION, ONLINE, MOMENTUM)
# The one tensor that weights may bring and a model of the same name has not: see `timm_backbone.fold_normalization`.
_FOLDED = "encoder.patch.bias"


def imagine(training: TrainConfig, reader: Reader | None = None) -> Method:
    """Return a run's method with shapes but no weights, which takes no memory; of a checkpoint, if that is given."""
    with torch.device("meta"):
        return build_method(training.method, _backbone(training, reader))


def networks(training: TrainConfig, checkpoint: Path | None) -> Method:
    """Return a run's method with the weights of a checkpoint, on the CPU; None means untrained."""
    torch.manual_seed(training.seed)
    if checkpoint is None:
        return build_method(training.method, ViT(training.model, training.seed))
    reader = Reader(checkpoint)
    method = build_method(training.method, _backbone(training, reader))
    engine_state.load_networks(method, reader)
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


def _backbone(training: TrainConfig, reader: Reader | None) -> ViT:
    """Return a backbone with a place for all that a checkpoint has; weights that it started from may be gone by now."""
    vit = ViT(replace(training.model, weights=""), training.seed)
    if reader is not None and vit.patch.bias is None and engine_state.is_saved(_FOLDED, reader):
        vit.patch.bias = nn.Parameter(torch.zeros(vit.embed_dim))
    return vit
