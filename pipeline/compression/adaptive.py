"""The grid that a run chooses its compression from while it trains, and how carefully it does."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.compression.base import Compression
from pipeline.compression.schedule import CompressionSchedule, compression

# Patch size and dropout of one cell of the grid.
GridCell = tuple[int, float]

# The sizes of Lin et al., 2024, go from the model's own 16 to 48.
LARGEST_SCALE = 3
# Leaving one out of two leaves no variance.
FEWEST_SUB_BATCHES = 3


@dataclass
class Adaptive(CompressionSchedule):
    """The cell of a (patch size, dropout) grid that the gradients of the live model ask for.

    Section 5 of Lin et al., 2024 names this and does it after the fact, on the checkpoints of a finished run. As a
    function of progress this is only the cell that a run starts with; `pipeline.tuning` moves it.
    """

    # None listed: every size from the model's own to three times it that divides the image.
    patch_sizes: list[int] = field(default_factory=list)
    dropouts: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 0.9])
    # The cell to start with; without a size, the middle one. A moderate mix of both is what the paper finds best early.
    start_patch_size: int | None = None
    start_dropout: float = 0.5
    # Of the budget spent so far, the most that goes into measuring.
    share: float = 0.02
    # So many that a measurement cuts a training batch into. Fewer are larger, hence closer to the batch that the
    # objective sees (negatives, batch norm); more tell the variance better.
    sub_batches: int = 8
    # Progress in which a measurement loses all but 1 / e of its weight: what is best moves slowly, the paper's panels
    # are a quarter of a run apart.
    memory: float = 0.1
    # Standard errors by which a neighbor must be better.
    evidence: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 0.5:
            raise ValueError(f"compression.share must be in (0, 0.5], got {self.share:g}; 0.02 is usual.")
        if not 0 < self.memory <= 1:
            raise ValueError(f"compression.memory must be a progress in (0, 1], got {self.memory:g}; 0.1 is usual.")
        if not self.evidence >= 0:
            raise ValueError(f"compression.evidence must not be negative, got {self.evidence:g}; 2 errors are usual.")
        if self.sub_batches < FEWEST_SUB_BATCHES:
            raise ValueError(
                f"compression.sub_batches must be at least {FEWEST_SUB_BATCHES}, got {self.sub_batches}; 8 is usual."
            )
        self._check_grid()

    def _check_grid(self) -> None:
        for name in ("patch_sizes", "dropouts"):
            values = getattr(self, name)
            if values != sorted(set(values)):
                raise ValueError(f"compression.{name} must rise, got {values}; neighbors on the grid are compared.")
        if not self.dropouts or not 0 <= self.dropouts[0] <= self.dropouts[-1] < 1:
            raise ValueError(f"compression.dropouts must list rates in [0, 1), got {self.dropouts}; [0.0] drops none.")
        if self.start_dropout not in self.dropouts:
            raise ValueError(
                f"compression.start_dropout must be one of compression.dropouts={self.dropouts}, "
                f"got {self.start_dropout:g}; start at one of them or list it."
            )
        if self.patch_sizes and self.start_patch_size not in (None, *self.patch_sizes):
            raise ValueError(
                f"compression.start_patch_size must be one of {self.patch_sizes}, got {self.start_patch_size}; "
                "start at one of them or list it in compression.patch_sizes."
            )

    def fitted(self, image_size: int, patch_size: int) -> FittedAdaptive:
        """Return the same with every size spelled out, for a model's image and patch size.

        Raises:
            ValueError: a listed size does not divide the image, the run starts outside the grid, or there is nothing
                to choose from.
        """
        fitting = [s for s in range(patch_size, LARGEST_SCALE * patch_size + 1) if image_size % s == 0]
        sizes = self.patch_sizes or fitting
        wrong = [size for size in sizes if size < 1 or image_size % size]
        if wrong:
            raise ValueError(
                f"compression.patch_sizes must divide model.image_size={image_size}, got {wrong[0]}; "
                f"leave them out for {', '.join(map(str, fitting))}."
            )
        if len(sizes) * len(self.dropouts) == 1:
            raise ValueError(
                f"compression.patch_sizes and compression.dropouts must leave a choice, got {sizes} and "
                f"{self.dropouts}; say compression=constant for a single one."
            )
        start = self.start_patch_size or sizes[min(max(1, (len(sizes) - 1) // 2), len(sizes) - 1)]
        spelled = {**vars(self), "patch_sizes": sizes, "start_patch_size": start}
        return FittedAdaptive(**spelled, own_patch_size=patch_size)


@dataclass
class FittedAdaptive(Adaptive):
    """The grid of a model whose sizes are known."""

    own_patch_size: int = 0

    @property
    def start(self) -> GridCell:
        """Return the cell to start with."""
        assert self.start_patch_size is not None
        return self.start_patch_size, self.start_dropout

    def at(self, progress: float) -> Compression:
        """Return the compression that a run starts with, whatever the progress."""
        return self.compression(self.start)

    def compression(self, cell: GridCell) -> Compression:
        """Return the compression of a cell; that of the model's own patches without dropout is the identity."""
        size, dropout = cell
        return compression(None if size == self.own_patch_size else size, dropout)

    def grid(self) -> list[GridCell]:
        """Return every cell of the grid."""
        return [(size, dropout) for size in self.patch_sizes for dropout in self.dropouts]

    def neighbors(self, cell: GridCell) -> list[GridCell]:
        """Return the cells one step away: the next smaller and larger patches, the next lower and higher dropout."""
        size, dropout = self.patch_sizes.index(cell[0]), self.dropouts.index(cell[1])
        near = ((size - 1, dropout), (size + 1, dropout), (size, dropout - 1), (size, dropout + 1))
        inside = [(i, j) for i, j in near if 0 <= i < len(self.patch_sizes) and 0 <= j < len(self.dropouts)]
        return [(self.patch_sizes[i], self.dropouts[j]) for i, j in inside]
