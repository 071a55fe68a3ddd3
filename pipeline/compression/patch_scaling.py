"""Flexible patch scaling: larger patches, resized kernels, fewer tokens."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.compression.base import Compressor


@dataclass(frozen=True)
class PatchScaling(Compressor):
    """Cut the image into patches of another size (Section 4.3 of Lin et al., 2024)."""

    size: int

    def patch_size(self, base: int) -> int:
        """Return the size of the patches in pixels, whatever the backbone's own."""
        return self.size
