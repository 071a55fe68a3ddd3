"""The DALI door: encoded images and parameter rows in, normalized views out, on the GPU or the CPU."""

from data.dali.pipeline import COLORS, Decoding, Encoded, ViewPipeline, build_graph
from data.dali.view import MEAN, STD

__all__ = ["COLORS", "MEAN", "STD", "Decoding", "Encoded", "ViewPipeline", "build_graph"]
