"""TensorBoard's event files, which after a resume read as if the run had never stopped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from monitoring.metrics import check


class TensorBoardSink:
    """Writes every number as a scalar of its name in the catalogue."""

    def __init__(self, directory: Path, resume_step: int) -> None:
        """Open a file of this life's own; what earlier lives wrote beyond `resume_step` is hidden from then on."""
        # A life that is killed leaves its files; readers drop of them what a later file says is purged.
        self._writer = SummaryWriter(str(directory), purge_step=resume_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the numbers at once: a killed process loses nothing that has left it."""
        check(metrics)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
