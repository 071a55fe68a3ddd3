"""Format onnx: a graph from images [B, 3, S, S] to features [B, D], or logits [B, C], for any B."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from pipeline.exports import timm_layout
from pipeline.exports.encoder import Encoder
from pipeline.exports.form import Form
from pipeline.exports.format import Format
from pipeline.exports.tensor_file import map_tensors, write_tensors

PACKAGES = ("onnx", "onnxscript")


def check() -> None:
    """Refuse to start without what PyTorch writes graphs with.

    Raises:
        ValueError: it is not installed.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ValueError(
            f"format=onnx needs {' and '.join(missing)}; say `pip install coldpress[onnx]`, or take format=timm."
        )


def write(encoder: Encoder, form: Form, folder: Path) -> None:
    """Write the graph of timm's model; unlike the other formats it takes memory for the whole model, twice."""
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        model = _model(encoder, form, Path(aside) / "model.safetensors")
        # Batches of two: one would be taken for a size that never changes.
        images = torch.zeros(2, 3, form.image_size, form.image_size)
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            input_names=["images"],
            output_names=[encoder.output],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
        assert program is not None
        program.save(folder / "model.onnx")


def _model(encoder: Encoder, form: Form, path: Path) -> Any:
    tensors = timm_layout.tensors(encoder, form)
    write_tensors(path, tensors)
    model = timm_layout.empty_model(encoder, form)
    model.load_state_dict(map_tensors(path, tensors), assign=True)
    return model.requires_grad_(False)


def how_to_load(encoder: Encoder, form: Form) -> str:
    """Return how ONNX Runtime does."""
    return f"""\
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
images = np.zeros((1, 3, {form.image_size}, {form.image_size}), np.float32)  # normalized, see below
({encoder.output},) = session.run(None, {{"images": images}})
"""


FORMAT = Format(write, how_to_load, library="onnx", check=check)
