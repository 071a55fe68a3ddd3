"""Spending fewer tokens: compressors and the schedules that choose among them."""

from pipeline.compression.adaptive import Adaptive, FittedAdaptive
from pipeline.compression.base import Compression, Compressor
from pipeline.compression.patch_scaling import PatchScaling
from pipeline.compression.schedule import CompressionSchedule, Constant, NoCompression, Stage, Staged
from pipeline.compression.token_dropout import TokenDropout

__all__ = [
    "Adaptive",
    "Compression",
    "CompressionSchedule",
    "Compressor",
    "Constant",
    "FittedAdaptive",
    "NoCompression",
    "PatchScaling",
    "Stage",
    "Staged",
    "TokenDropout",
]
