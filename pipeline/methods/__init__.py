"""Self-supervised methods, one file each."""

from typing import Any

from pipeline.methods.base import Method
from pipeline.methods.dino import DINO, DINOConfig
from pipeline.methods.localmim import LocalMIM, LocalMIMConfig
from pipeline.methods.moco import MoCo, MoCoConfig
from pipeline.methods.simclr import SimCLR, SimCLRConfig
from pipeline.models.vit import ViT

__all__ = ["METHODS", "DINOConfig", "LocalMIMConfig", "Method", "MoCoConfig", "SimCLRConfig", "build_method"]

METHODS: dict[type[Any], type[Any]] = {
    MoCoConfig: MoCo,
    SimCLRConfig: SimCLR,
    DINOConfig: DINO,
    LocalMIMConfig: LocalMIM,
}


def build_method(config: object, encoder: ViT) -> Method:
    """Return the method that a config describes, around an encoder."""
    method: Method = METHODS[type(config)](config, encoder)
    return method
