"""Format safetensors: the encoder by coldpress's own names, patches as flexible as in training."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from pipeline.exports import timm_layout
from pipeline.exports.encoder import Encoder
from pipeline.exports.form import Form, kernel, positions
from pipeline.exports.format import Format
from pipeline.exports.tensor_file import Promised, write_tensors
from pipeline.models.positions import Positions
from pipeline.models.vit import ViT, ViTConfig


def write(encoder: Encoder, form: Form, folder: Path) -> None:
    """Write tensors and config in our names.

    Raises:
        ValueError: there is a classifier, too.
    """
    if encoder.classifier is not None:
        raise ValueError("format=safetensors has no place for the classifier of a fine-tuned run; take format=timm.")
    config = config_of(encoder.config, form)
    write_tensors(folder / "model.safetensors", _tensors(encoder, form, config))
    values = asdict(config) | {"positions": config.positions.value}
    content = {"model": values, "preprocessing": timm_layout.preprocessing(form)}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")


def config_of(config: ViTConfig, form: Form) -> ViTConfig:
    """Return the config of what is written.

    Fixed positions depend on the grid that they were trained on; in another form they are written down as learned ones.
    """
    config = replace(config, weights="", compile=False)
    if form.is_own(config):
        return config
    return replace(config, patch_size=form.patch_size, image_size=form.image_size, positions=Positions.learned)


def _tensors(encoder: Encoder, form: Form, config: ViTConfig) -> list[Promised]:
    with torch.device("meta"):
        target = ViT(config, seed=0)
    shapes = {name: tuple(parameter.shape) for name, parameter in target.named_parameters()}
    makers = {name: partial(encoder.tensor, name) for name in shapes} | {"patch.weight": partial(kernel, encoder, form)}
    if "positions" in shapes:
        rows, with_bias = shapes["positions"][0], "patch.bias" not in shapes
        makers["positions"] = partial(positions, encoder, form, rows, with_bias=with_bias)
    return [Promised(name, shape, makers[name]) for name, shape in shapes.items()]


def how_to_load(encoder: Encoder, form: Form) -> str:
    """Return how coldpress itself loads it."""
    return f"""\
import json

import torch
from safetensors.torch import load_file

from pipeline.compression import Compression
from pipeline.models.vit import Positions, ViT, ViTConfig

with open("config.json") as file:
    values = json.load(file)["model"]
model = ViT(ViTConfig(**values | {{"positions": Positions(values["positions"])}}), seed=0).eval()
model.load_state_dict(load_file("model.safetensors"))

images = torch.zeros(1, 3, {form.image_size}, {form.image_size})  # normalized, see below
with torch.no_grad():
    # Compression((PatchScaling(32),)) would cut them into patches of 32 pixels.
    features = model(images, Compression(), torch.arange(len(images)))
"""


FORMAT = Format(write, how_to_load, library="coldpress")
