"""Which compression applies at which progress: none, constant, staged."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.compression.base import Compression, Compressor, check_divides
from pipeline.compression.patch_scaling import PatchScaling
from pipeline.compression.schedule_file import read_schedule
from pipeline.compression.token_dropout import TokenDropout


def compression(patch_size: int | None, dropout: float) -> Compression:
    """Return the compression of one cell of the (patch size, dropout) grid."""
    compressors: list[Compressor] = []
    if patch_size is not None:
        compressors.append(PatchScaling(patch_size))
    if dropout:
        compressors.append(TokenDropout(dropout))
    return Compression(tuple(compressors))


@dataclass
class Cell:
    """One cell of the (patch size, dropout) grid for the query, and what the key does otherwise than the method says.

    A patch size of None is the model's own; ``key_patch_size`` and ``key_dropout`` of None follow the method's rule
    (MoCo-v3, DINO: the query's patches, no dropout; SimCLR: the query's).
    """

    patch_size: int | None = None
    dropout: float = 0.0
    key_patch_size: int | None = None
    key_dropout: float | None = None

    def check(self, path: str) -> None:
        """Refuse a cell that no run can mean.

        Raises:
            ValueError: a dropout is outside [0, 1) or a patch size is not positive.
        """
        for name in ("dropout", "key_dropout"):
            dropout = getattr(self, name)
            if dropout is not None and not 0 <= dropout < 1:
                raise ValueError(f"{path}.{name} must be in [0, 1), got {dropout}; 0 keeps every token.")
        for name in ("patch_size", "key_patch_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(
                    f"{path}.{name} must be a number of pixels, got {size}; leave it out for the usual one."
                )

    def check_fits(self, path: str, image_size: int, base: int) -> None:
        """Refuse patches that leave pixels of the model's images over.

        Raises:
            ValueError: a patch size does not divide the image size.
        """
        for name in ("patch_size", "key_patch_size"):
            check_divides(f"{path}.{name}", getattr(self, name) or base, image_size, base)

    def query(self) -> Compression:
        """Return the query's compression."""
        return compression(self.patch_size, self.dropout)

    def key(self, inherited: Compression) -> Compression:
        """Return the key's compression, given what the method's rule makes of the query's."""
        patch, dropout = inherited.only(PatchScaling), inherited.only(TokenDropout)
        if self.key_patch_size is not None:
            patch = compression(self.key_patch_size, 0.0)
        if self.key_dropout is not None:
            dropout = compression(None, self.key_dropout)
        return Compression(patch.compressors + dropout.compressors)


@dataclass
class CompressionSchedule:
    """Progress in [0, 1] -> Compression."""

    def at(self, progress: float) -> Compression:
        """Return the compression of the step that starts at `progress`."""
        raise NotImplementedError

    def key_at(self, progress: float, inherited: Compression) -> Compression:
        """Return the key's compression, given what the method's rule makes of the query's."""
        return inherited

    def changes(self) -> list[float]:
        """Return the progress values, in (0, 1), at which the compression changes."""
        return []

    def cells(self) -> dict[str, Cell]:
        """Return every cell by its dotted path."""
        return {}


@dataclass
class NoCompression(CompressionSchedule):
    """Every token of every image, always."""

    def at(self, progress: float) -> Compression:
        """Return the identity."""
        return Compression()


@dataclass
class Constant(Cell, CompressionSchedule):
    """One compression for the whole run."""

    def __post_init__(self) -> None:
        self.check("compression")

    def cells(self) -> dict[str, Cell]:
        """Return the one cell."""
        return {"compression": self}

    def at(self, progress: float) -> Compression:
        """Return the one compression."""
        return self.query()

    def key_at(self, progress: float, inherited: Compression) -> Compression:
        """Return the one compression of the key."""
        return self.key(inherited)


@dataclass
class Stage(Cell):
    """The compression from the previous stage's end until progress `until`."""

    until: float = 1.0


@dataclass
class Staged(CompressionSchedule):
    """One compression per stage; what follows the last stage is uncompressed."""

    stages: list[Stage] = field(default_factory=list)
    # Where the stages come from if they are not listed: a file, or the name of a schedule that ships.
    file: str = ""

    def __post_init__(self) -> None:
        place = "compression.stages"
        if self.file:
            place = f"compression.file: {self.file}: stages"
            self._read()
        if not self.stages:
            raise ValueError(
                f"{place} must list at least one stage, got []; say for instance "
                "compression.stages=[{until:0.5,patch_size:28,dropout:0.5}], or name a file: compression.file=PATH."
            )
        previous = 0.0
        for i, stage in enumerate(self.stages):
            stage.check(f"{place}[{i}]")
            if not previous < stage.until <= 1:
                raise ValueError(
                    f"{place}[{i}].until must rise from stage to stage within (0, 1], "
                    f"got {stage.until} after {previous}; sort the stages by their end."
                )
            previous = stage.until

    def cells(self) -> dict[str, Cell]:
        """Return the stages."""
        return {f"compression.stages[{i}]": stage for i, stage in enumerate(self.stages)}

    def at(self, progress: float) -> Compression:
        """Return the compression of the first stage that ends after `progress`."""
        return self._stage(progress).query()

    def key_at(self, progress: float, inherited: Compression) -> Compression:
        """Return the key's compression of that stage."""
        return self._stage(progress).key(inherited)

    def changes(self) -> list[float]:
        """Return the ends of the stages that lie before the end of the run."""
        return [stage.until for stage in self.stages if stage.until < 1]

    def _read(self) -> None:
        """Take the stages of the file and forget its name: what was read is from now on the schedule."""
        if self.stages:
            raise ValueError(
                f"compression.stages and compression.file={self.file} cannot both be given; "
                "add compression.stages=[] to take the file's, or compression.file='' to take the list."
            )
        self.stages, self.file = read_schedule(self.file, Stage), ""

    def _stage(self, progress: float) -> Cell:
        return next((stage for stage in self.stages if progress < stage.until), Cell())
