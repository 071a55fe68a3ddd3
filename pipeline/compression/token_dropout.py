"""Random token dropout: every image keeps its own random subset of patch tokens."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from pipeline.compression.base import Compressor


@dataclass(frozen=True)
class TokenDropout(Compressor):
    """Drop a share of the patch tokens, never the class token (Section 4.2 of Lin et al., 2024)."""

    rate: float

    @property
    def kept_share(self) -> Fraction:
        """Return 1 - rate exactly; in floats int(100 * (1 - 0.9)) is 9, not 10."""
        return 1 - Fraction(str(self.rate))

    def keep(self, num_tokens: int) -> int:
        """Return floor(N (1 - rate)), at least one token."""
        return max(1, int(num_tokens * self.kept_share))
