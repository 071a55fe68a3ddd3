"""The encoders of a run, and the tensors of one of them and of its classifier, each read when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline import engine_state
from pipeline.config import TrainConfig
from pipeline.methods import Classifier, FineTune, Method
from pipeline.models.vit import ViT, ViTConfig
from pipeline.networks import MOMENTUM, ONLINE, encoder_of, imagine, networks
from pipeline.pieces import Reader


@dataclass(frozen=True)
class Encoder:
    """An encoder of a run: its shapes, and its tensors one at a time.

    Method and `vit`, which is one of its parts, have no weights where these come from a checkpoint. `read` takes a
    parameter of one of both.
    """

    method: Method
    vit: ViT
    read: Callable[[nn.Parameter], Tensor]
    # Names of the classes of a classifier, where they are known.
    labels: tuple[str, ...] = ()

    @property
    def which(self) -> str:
        """Return whether it is the online or the momentum encoder."""
        return ONLINE if self.vit is self.method.encoder else MOMENTUM

    @property
    def is_representation(self) -> bool:
        """Return whether it is the one whose features are evaluated."""
        return self.vit is self.method.representation

    @property
    def output(self) -> str:
        """Return what comes out of an export."""
        return "logits" if self.classifier is not None else "features"

    @property
    def config(self) -> ViTConfig:
        """Return which Vision Transformer it is."""
        return self.vit.config

    @property
    def classifier(self) -> Classifier | None:
        """Return what stands behind it in a run that fine-tunes."""
        if not isinstance(self.method, FineTune):
            return None
        return self.method.classifier_of(averaged=self.which == MOMENTUM)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor by name."""
        return {name: tuple(parameter.shape) for name, parameter in self.vit.named_parameters()}

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in fp32, as evaluation has it, whatever the run computed in."""
        return self._fp32(self.vit.get_parameter(name))

    def classifiers_tensor(self, name: str) -> Tensor:
        """Return a tensor of the classifier in fp32."""
        assert self.classifier is not None
        return self._fp32(self.classifier.get_parameter(name))

    def _fp32(self, parameter: nn.Parameter) -> Tensor:
        return self.read(parameter).detach().to(torch.float32)


def read_encoder(training: TrainConfig, checkpoint: Path, which: str) -> Encoder:
    """Return an encoder as a checkpoint has it; nothing but names and shapes is read yet.

    Raises:
        ValueError: the method has no such encoder, or the checkpoint is damaged or of another model.
    """
    reader = Reader(checkpoint)
    method = imagine(training, reader)
    vit = encoder_of(method, which)
    places = engine_state.saved_names(method, reader)
    saved = {name: places[parameter] for name, parameter in vit.named_parameters()}
    try:
        for name, parameter in vit.named_parameters():
            reader.check(saved[name], tuple(parameter.shape))
    except ValueError as error:
        said = str(error).rstrip(".")
        raise ValueError(
            f"{said}; it is of another model than overrides.yaml says; take another checkpoint=STEP."
        ) from error
    return Encoder(method, vit, lambda parameter: reader.whole(places[parameter]))


def untrained_encoder(training: TrainConfig, which: str) -> Encoder:
    """Return an encoder as it was before the first step, whole in memory.

    Raises:
        ValueError: the method has no such encoder.
    """
    method = networks(training, None)
    vit = encoder_of(method, which)
    return Encoder(method, vit, lambda parameter: parameter)
