"""Methods, one file each."""

from typing import Any

from pipeline.methods.base import Method
from pipeline.methods.dino import DINO, DINOConfig
from pipeline.methods.finetune import (
    Classifier,
    FineTune,
    FineTuneDeiTConfig,
    FineTuneLocalMIMConfig,
    FineTuneMAEConfig,
    Pool,
)
from pipeline.methods.localmim import LocalMIM, LocalMIMConfig
from pipeline.methods.moco import MoCo, MoCoConfig
from pipeline.methods.simclr import SimCLR, SimCLRConfig
from pipeline.models.vit import ViT

__all__ = [
    "METHODS",
    "Classifier",
    "DINOConfig",
    "FineTune",
    "FineTuneDeiTConfig",
    "FineTuneLocalMIMConfig",
    "FineTuneMAEConfig",
    "LocalMIMConfig",
    "Method",
    "MoCoConfig",
    "Pool",
    "SimCLRConfig",
    "build_method",
    "check_compressible",
]

METHODS: dict[type[Any], type[Any]] = {
    MoCoConfig: MoCo,
    SimCLRConfig: SimCLR,
    DINOConfig: DINO,
    LocalMIMConfig: LocalMIM,
    FineTuneDeiTConfig: FineTune,
    FineTuneMAEConfig: FineTune,
    FineTuneLocalMIMConfig: FineTune,
}


def check_compressible(config: object) -> None:
    """Raise ValueError, with the reason, for the config of a method whose sequences cannot be compressed."""
    reason = METHODS[type(config)].incompressible
    if reason:
        raise ValueError(reason)


def build_method(config: object, encoder: ViT) -> Method:
    """Return the method that a config describes, around an encoder."""
    method: Method = METHODS[type(config)](config, encoder)
    return method
