"""Format timm: a folder that `timm.create_model` reads by itself, and a file for its `checkpoint_path`."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.exports import timm_layout
from pipeline.exports.encoder import Encoder
from pipeline.exports.form import Form
from pipeline.exports.format import Format
from pipeline.exports.tensor_file import write_tensors


def write(encoder: Encoder, form: Form, folder: Path) -> None:
    """Write tensors and config in timm's names."""
    write_tensors(folder / "model.safetensors", timm_layout.tensors(encoder, form))
    (folder / "config.json").write_text(json.dumps(timm_layout.describe(encoder, form), indent=2) + "\n")


def how_to_load(encoder: Encoder, form: Form) -> str:
    """Return timm's own two ways."""
    return f"""\
import timm
import torch

model = timm.create_model("local-dir:.", pretrained=True).eval()

# Or, without config.json:
arguments = {timm_layout.model_args(encoder, form)}
model = timm.create_model(
    "{timm_layout.architecture(encoder.config)}", checkpoint_path="model.safetensors", **arguments
).eval()

images = torch.zeros(1, 3, {form.image_size}, {form.image_size})  # normalized, see below
with torch.no_grad():
    {encoder.output} = model(images)
"""


FORMAT = Format(write, how_to_load, library="timm")
