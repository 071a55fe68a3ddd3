"""Command: an encoder of a run as files that timm, PyTorch or ONNX load, with a model card."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path

from data.manifest import Manifest
from pipeline.checkpoint_files import asked_for
from pipeline.compose import load
from pipeline.config import TrainConfig
from pipeline.exports import FORMATS
from pipeline.exports.card import Card
from pipeline.exports.encoder import Encoder, read_encoder, untrained_encoder
from pipeline.exports.folder import published
from pipeline.exports.form import Form, form_of
from pipeline.networks import ENCODERS, REPRESENTATION
from pipeline.parts import build_schedules
from pipeline.run_directory import read_overrides

log = logging.getLogger(__name__)


@dataclass
class ExportConfig:
    """Export of one run's encoder."""

    run: str
    runs: str = "runs"
    # latest, init (the untrained encoder of the same seed) or a step number.
    checkpoint: str = "latest"
    # timm: a folder for timm.create_model; safetensors: coldpress's own names; torch: a state dict in timm's; onnx.
    format: str = "timm"
    # representation (the one that is evaluated), online, or momentum (the teacher) of methods that have one.
    encoder: str = REPRESENTATION
    # Pixels along the side of a patch, resized as in training, and of an image; 0 is what the run trained with.
    patch_size: int = 0
    image_size: int = 0
    # A folder that does not exist yet; empty: below the run's own directory.
    output: str = ""
    # For the model card, as model hubs name it: apache-2.0, cc-by-nc-4.0, ...; empty says that it is not stated.
    license: str = ""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {self.format}.")
        if self.encoder not in ENCODERS:
            raise ValueError(f"encoder must be one of {', '.join(ENCODERS)}, got {self.encoder}.")
        for name in ("patch_size", "image_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be a number of pixels, got {getattr(self, name)}; 0 is the run's own.")
        if not re.fullmatch(r"[a-z0-9.+-]*", self.license):
            raise ValueError(f"license must be a name like apache-2.0 or cc-by-nc-4.0, got {self.license!r}.")

    @property
    def directory(self) -> Path:
        """Return the run's own directory."""
        return Path(self.runs) / self.run


def run(config: ExportConfig) -> None:
    """Write an encoder and its model card to a new folder; it is there whole or not at all.

    Raises:
        ValueError: there is no such run, checkpoint or encoder, sizes that do not fit, or the folder exists.
    """
    chosen = FORMATS[config.format]
    chosen.check()
    training: TrainConfig = load("train", read_overrides(config.directory))
    form = form_of(training.model, config.patch_size, config.image_size)
    checkpoint = None if config.checkpoint == "init" else asked_for(config.directory / "checkpoints", config.checkpoint)
    name = checkpoint.name if checkpoint else "init"
    encoder = _encoder(config, training, checkpoint)
    card = Card(
        training=training,
        schedules=build_schedules(training, encoder.method),
        encoder=encoder,
        form=form,
        checkpoint=checkpoint,
        checkpoint_name=name,
        directory=config.directory,
        license=config.license,
    )
    output = Path(config.output or config.directory / "export" / _default_name(config, name, form, training))
    with published(output) as folder:
        chosen.write(encoder, form, folder)
        card.write(chosen, folder)
    log.info("written: %s, the %s encoder of %s, checkpoint %s", output, encoder.which, config.directory, name)
    if not config.license:
        log.info("its model card says that no license is stated; license=NAME states one")


def _encoder(config: ExportConfig, training: TrainConfig, checkpoint: Path | None) -> Encoder:
    if checkpoint is None:
        encoder = untrained_encoder(training, config.encoder)
    else:
        encoder = read_encoder(training, checkpoint, config.encoder)
    return replace(encoder, labels=_labels(training)) if encoder.classifier is not None else encoder


def _labels(training: TrainConfig) -> tuple[str, ...]:
    """Return the names of the classes, none where the shards are not there any more."""
    try:
        return Manifest.load(Path(training.data.shards)).classes
    except (ValueError, OSError):
        log.warning("the names of the classes are not known: %s is not there", training.data.shards)
        return ()


def _default_name(config: ExportConfig, checkpoint: str, form: Form, training: TrainConfig) -> str:
    """Return a name that tells exports of a run apart."""
    words = [config.format, checkpoint]
    words += [config.encoder] if config.encoder != REPRESENTATION else []
    if not form.is_own(training.model):
        words += [f"patch{form.patch_size}", f"image{form.image_size}"]
    return "-".join(words)
