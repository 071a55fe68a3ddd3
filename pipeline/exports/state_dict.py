"""Format torch: a state dict in timm's names that `torch.load` reads without running code."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from pipeline.exports import timm_layout
from pipeline.exports.encoder import Encoder
from pipeline.exports.form import Form
from pipeline.exports.format import Format
from pipeline.exports.tensor_file import map_tensors, write_tensors


def write(encoder: Encoder, form: Form, folder: Path) -> None:
    """Write the state dict, by way of the disk: `torch.save` wants all tensors at once."""
    tensors = timm_layout.tensors(encoder, form)
    aside = folder / "model.safetensors"
    write_tensors(aside, tensors)
    torch.save(map_tensors(aside, tensors), folder / "model.pth")
    aside.unlink()
    (folder / "config.json").write_text(json.dumps(timm_layout.describe(encoder, form), indent=2) + "\n")


def how_to_load(encoder: Encoder, form: Form) -> str:
    """Return how to load a state dict strictly."""
    return f"""\
import timm
import torch

arguments = {timm_layout.model_args(encoder, form)}
model = timm.create_model("{timm_layout.architecture(encoder.config)}", **arguments).eval()
model.load_state_dict(torch.load("model.pth", weights_only=True))

images = torch.zeros(1, 3, {form.image_size}, {form.image_size})  # normalized, see below
with torch.no_grad():
    {encoder.output} = model(images)
"""


FORMAT = Format(write, how_to_load, library="timm")
