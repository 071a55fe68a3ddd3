"""Which compression applies at which progress: none, constant, staged."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.compression.base import Compression, Compressor
from pipeline.compression.patch_scaling import PatchScaling
from pipeline.compression.token_dropout import TokenDropout


def compression(patch_size: int | None, dropout: float) -> Compression:
    """Return the compression of one cell of the (patch size, dropout) grid."""
    compressors: list[Compressor] = []
    if patch_size is not None:
        compressors.append(PatchScaling(patch_size))
    if dropout:
        compressors.append(TokenDropout(dropout))
    return Compression(tuple(compressors))


def check_cell(path: str, patch_size: int | None, dropout: float) -> None:
    """Refuse a cell that no run can mean.

    Raises:
        ValueError: the dropout is outside [0, 1) or the patch size is not positive.
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"{path}.dropout must be in [0, 1), got {dropout}; 0 keeps every token.")
    if patch_size is not None and patch_size < 1:
        raise ValueError(
            f"{path}.patch_size must be a number of pixels, got {patch_size}; leave it out for the model's own."
        )


@dataclass
class CompressionSchedule:
    """Progress in [0, 1] -> Compression."""

    def at(self, progress: float) -> Compression:
        """Return the compression of the step that starts at `progress`."""
        raise NotImplementedError

    def changes(self) -> list[float]:
        """Return the progress values, in (0, 1), at which the compression changes."""
        return []


@dataclass
class NoCompression(CompressionSchedule):
    """Every token of every image, always."""

    def at(self, progress: float) -> Compression:
        """Return the identity."""
        return Compression()


@dataclass
class Constant(CompressionSchedule):
    """One compression for the whole run."""

    patch_size: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_cell("compression", self.patch_size, self.dropout)

    def at(self, progress: float) -> Compression:
        """Return the one compression."""
        return compression(self.patch_size, self.dropout)


@dataclass
class Stage:
    """The compression from the previous stage's end until progress `until`."""

    until: float = 1.0
    patch_size: int | None = None
    dropout: float = 0.0


@dataclass
class Staged(CompressionSchedule):
    """One compression per stage; what follows the last stage is uncompressed."""

    stages: list[Stage] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError(
                "compression.stages must list at least one stage, got []; "
                "say for instance compression.stages=[{until:0.5,patch_size:24,dropout:0.5}]."
            )
        previous = 0.0
        for i, stage in enumerate(self.stages):
            check_cell(f"compression.stages[{i}]", stage.patch_size, stage.dropout)
            if not previous < stage.until <= 1:
                raise ValueError(
                    f"compression.stages[{i}].until must rise from stage to stage within (0, 1], "
                    f"got {stage.until} after {previous}; sort the stages by their end."
                )
            previous = stage.until

    def at(self, progress: float) -> Compression:
        """Return the compression of the first stage that ends after `progress`."""
        for stage in self.stages:
            if progress < stage.until:
                return compression(stage.patch_size, stage.dropout)
        return Compression()

    def changes(self) -> list[float]:
        """Return the ends of the stages that lie before the end of the run."""
        return [stage.until for stage in self.stages if stage.until < 1]
