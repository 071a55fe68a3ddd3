"""The model card of an export: a README.md in the form that model hubs read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from pipeline.config import TrainConfig
from pipeline.exports import facts, timm_layout
from pipeline.exports.encoder import Encoder
from pipeline.exports.form import Form
from pipeline.exports.format import Format
from pipeline.networks import MOMENTUM
from pipeline.schedules import Schedules

NAME = "README.md"
_CODE = "```"


@dataclass(frozen=True)
class Card:
    """What a model card is made of; `checkpoint` is None for an untrained encoder."""

    training: TrainConfig
    schedules: Schedules
    encoder: Encoder
    form: Form
    checkpoint: Path | None
    checkpoint_name: str
    # Where the run is.
    directory: Path
    license: str

    def write(self, format: Format, folder: Path) -> None:
        """Write the card beside the files of a format."""
        parts = [
            self._front_matter(format),
            self._title(),
            self._loading(format),
            self._preprocessing(),
            self._training(),
            self._schedule(),
            self._results(),
            self._versions(),
            self._license(),
        ]
        (folder / NAME).write_text("\n\n".join(part.strip() for part in parts if part) + "\n")

    def _front_matter(self, format: Format) -> str:
        lines = ["---", f"license: {self.license or 'other'}", f"pipeline_tag: {self._task()}"]
        lines += [f"library_name: {format.library}"] if format.library else []
        return "\n".join([*lines, "tags:", "- self-supervised-learning", "- vision-transformer", "---"])

    def _task(self) -> str:
        return "image-classification" if self.encoder.classifier is not None else "image-feature-extraction"

    def _title(self) -> str:
        encoder, form = self.encoder, self.form
        which = "momentum encoder (the teacher)" if encoder.which == MOMENTUM else "online encoder"
        own = "its own" if form.is_own(encoder.config) else f"trained with {encoder.config.patch_size}: resized"
        size = f"images of {form.image_size} x {form.image_size} pixels in patches of {form.patch_size} ({own})"
        if encoder.classifier is not None:
            which = "average of the weights" if encoder.which == MOMENTUM else "classifier"
            return (
                f"# {self.training.run}\n\n"
                f"The {which} of a run of coldpress that fine-tuned an encoder: {size} -> logits of "
                f"{encoder.method.classes} classes. {self._parameters():,} parameters, fp32."
            )
        return (
            f"# {self.training.run}\n\n"
            f"The {which} of a self-supervised pre-training run of coldpress: {size} -> features of "
            f"{encoder.vit.embed_dim} numbers, the class token after the last norm. {self._parameters():,} parameters, "
            "fp32. There is no classifier."
        )

    def _loading(self, format: Format) -> str:
        code = format.how_to_load(self.encoder, self.form)
        return f"## How to load it\n\nIn this folder:\n\n{_CODE}python\n{code}{_CODE}"

    def _preprocessing(self) -> str:
        words = timm_layout.preprocessing(self.form)
        mean, std = (", ".join(map(str, words[key])) for key in ("mean", "std"))
        return (
            f"## Preprocessing\n\nA centered square of {words['crop_pct']} of the shorter side, scaled to "
            f"{self.form.image_size} x {self.form.image_size} pixels ({words['interpolation']}, antialiased), values "
            f"in [0, 1], then per channel minus ({mean}), over ({std})."
        )

    def _training(self) -> str:
        rows = facts.data(self.training) + facts.training(self.training) + facts.checkpoint(self.checkpoint)
        return "## Training\n\n" + _table(("", ""), rows)

    def _schedule(self) -> str:
        model = self.training.model
        rows = facts.schedule(self.schedules, model.image_size, model.patch_size)
        text = "## Compression and freezing\n\n" + _table(("progress", "patch size", "dropout", "frozen layers"), rows)
        note = (
            "\n\nCompression was chosen while training (`compression=adaptive`); its columns are how the run began."
            if facts.is_adaptive(self.schedules)
            else ""
        )
        return text + note

    def _results(self) -> str:
        rows = facts.results(self.directory, self.checkpoint_name)
        if not rows:
            return "## Results\n\nThis checkpoint was not evaluated when it was exported."
        same = self.encoder.is_representation and self.form.is_own(self.encoder.config)
        note = "\n\nThese are of the encoder and patches that the run is evaluated with, not of this export."
        return "## Results\n\n" + _table(("evaluation", "queries", "top-1 (95 %)"), rows) + ("" if same else note)

    def _versions(self) -> str:
        rows = [("coldpress", version("coldpress")), *facts.versions(self.directory)]
        return "## Versions\n\n" + _table(("package", "version"), rows)

    def _license(self) -> str:
        stated = self.license or "Not stated: ask whoever published it, or export with license=NAME."
        return f"## License\n\n{stated}"

    def _parameters(self) -> int:
        networks = filter(None, (self.encoder.vit, self.encoder.classifier))
        return sum(parameter.numel() for network in networks for parameter in network.parameters())


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
