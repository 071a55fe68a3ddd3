"""An encoder as timm's Vision Transformer of the same name: arguments, preprocessing, tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from data.views import center_view
from pipeline.exports.encoder import Encoder
from pipeline.exports.form import Form, kernel, positions
from pipeline.exports.tensor_file import Promised
from pipeline.methods import Pool
from pipeline.models.vit import ViTConfig

_KERNEL, _BIAS, _CLASS, _POSITIONS = "patch_embed.proj.weight", "patch_embed.proj.bias", "cls_token", "pos_embed"
# Of ours, what has another name in timm.
_EMBEDDING = ("patch.weight", "patch.bias", "class_token", "positions")


def architecture(config: ViTConfig) -> str:
    """Return timm's name of the model, without the weights that it may have named too."""
    return config.name.partition(".")[0]


def model_args(encoder: Encoder, form: Form) -> dict[str, Any]:
    """Return what `timm.create_model` must be told beside the name."""
    sizes = {"img_size": form.image_size, "patch_size": form.patch_size, **encoder.config.changes}
    return {**sizes, "num_classes": encoder.method.classes, "global_pool": _pool(encoder)}


def _pool(encoder: Encoder) -> str:
    """Return timm's name of what is classified."""
    classifier = encoder.classifier
    return "avg" if classifier is not None and classifier.pool is Pool.mean else "token"


def preprocessing(form: Form) -> dict[str, Any]:
    """Return in timm's words how evaluation makes pixels of an image."""
    view = center_view(form.image_size)
    return {
        "input_size": [3, form.image_size, form.image_size],
        "fixed_input_size": True,
        "interpolation": view.interpolation,
        "crop_pct": view.center_fraction,
        "crop_mode": "center",
        "mean": list(IMAGENET_DEFAULT_MEAN),
        "std": list(IMAGENET_DEFAULT_STD),
    }


def describe(encoder: Encoder, form: Form) -> dict[str, Any]:
    """Return the `config.json` from which timm builds the model of a folder."""
    return {
        "architecture": architecture(encoder.config),
        "num_classes": encoder.method.classes,
        "num_features": encoder.vit.embed_dim,
        "global_pool": _pool(encoder),
        "model_args": model_args(encoder, form),
        "pretrained_cfg": {
            **preprocessing(form),
            "num_classes": encoder.method.classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            **({"label_names": list(encoder.labels)} if encoder.labels else {}),
        },
    }


def empty_model(encoder: Encoder, form: Form) -> Any:
    """Return timm's model with shapes but no weights."""
    with torch.device("meta"):
        return timm.create_model(architecture(encoder.config), **model_args(encoder, form)).eval()


def tensors(encoder: Encoder, form: Form) -> list[Promised]:
    """Return every tensor of timm's model, in its order.

    Raises:
        ValueError: timm's model has other tensors than the encoder has.
    """
    shapes = {name: tuple(each.shape) for name, each in empty_model(encoder, form).state_dict().items()}
    as_they_are = encoder.shapes().keys() - set(_EMBEDDING)
    makers: dict[str, Callable[[], Tensor]] = {name: partial(encoder.tensor, name) for name in as_they_are}
    makers |= {
        _CLASS: partial(encoder.tensor, "class_token"),
        _KERNEL: partial(kernel, encoder, form),
        _POSITIONS: lambda: positions(encoder, form, shapes[_POSITIONS][1], with_bias=_BIAS not in shapes)[None],
    }
    if _BIAS in shapes:
        makers[_BIAS] = partial(encoder.tensor, "patch.bias")
    if encoder.classifier is not None:
        makers = _with_classifier(makers, encoder)
    if differing := shapes.keys() ^ makers.keys():
        raise ValueError(
            f"model.name={encoder.config.name}: this version of timm and the encoder differ in {min(differing)}; "
            "install the version that constraints.txt names, or take format=safetensors."
        )
    return [Promised(name, shape, makers[name]) for name, shape in shapes.items()]


def _with_classifier(makers: dict[str, Callable[[], Tensor]], encoder: Encoder) -> dict[str, Callable[[], Tensor]]:
    """Return the makers of the tensors of an encoder with its classifier, whose norm may stand in place of its own."""
    assert encoder.classifier is not None
    ours = [name for name, _ in encoder.classifier.named_parameters()]
    names = {name.replace("linear.", "head.").replace("norm.", "fc_norm."): name for name in ours}
    if encoder.classifier.pool is Pool.mean:
        makers = {name: make for name, make in makers.items() if not name.startswith("norm.")}
    return makers | {theirs: partial(encoder.classifiers_tensor, name) for theirs, name in names.items()}
