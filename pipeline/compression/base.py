"""What it means to shorten a token sequence: compressors and their composition."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

CLASS_TOKENS = 1


def check_divides(path: str, size: int, image_size: int, base: int) -> None:
    """Refuse a patch size that leaves pixels over.

    Raises:
        ValueError: it does not divide the image size; names `path` and the sizes from `base` on that do.
    """
    if image_size % size:
        fitting = [s for s in range(base, image_size + 1) if image_size % s == 0]
        raise ValueError(
            f"{path} must divide model.image_size={image_size}, got {size}; "
            f"sizes that do: {', '.join(map(str, fitting))}."
        )


class Compressor:
    """A way to spend fewer tokens on an image; the base class is the identity."""

    def patch_size(self, base: int) -> int:
        """Return the patch size in pixels, given the backbone's own."""
        return base

    def keep(self, num_tokens: int) -> int:
        """Return how many of an image's patch tokens enter the blocks."""
        return num_tokens

    @property
    def kept_share(self) -> Fraction:
        """Return the share of tokens kept, before any rounding."""
        return Fraction(1)


@dataclass(frozen=True)
class Compression:
    """Several compressors in a row; the empty one leaves the sequence alone."""

    compressors: tuple[Compressor, ...] = ()

    def patch_size(self, base: int) -> int:
        """Return the patch size in pixels after all compressors."""
        for compressor in self.compressors:
            base = compressor.patch_size(base)
        return base

    def num_patches(self, image_size: int, base: int) -> int:
        """Return the patches of a square image before any is dropped.

        Raises:
            ValueError: the patch size does not divide the image size.
        """
        size = self.patch_size(base)
        check_divides("compression.patch_size", size, image_size, base)
        return (image_size // size) ** 2

    def keep(self, num_patches: int) -> int:
        """Return the patch tokens that are left of `num_patches`."""
        for compressor in self.compressors:
            num_patches = compressor.keep(num_patches)
        return num_patches

    def sequence_length(self, image_size: int, base: int) -> int:
        """Return the real length of the blocks' input, class token included."""
        return self.keep(self.num_patches(image_size, base)) + CLASS_TOKENS

    def nominal_length(self, image_size: int, base: int) -> Fraction:
        """Return the length that Figure 3 of Lin et al., 2024 counts with.

        The paper scales the class token too and does not round: (N + 1)(1 - d).
        """
        length = Fraction(self.num_patches(image_size, base) + CLASS_TOKENS)
        for compressor in self.compressors:
            length *= compressor.kept_share
        return length

    def only(self, kind: type[Compressor]) -> Compression:
        """Return the same compression with nothing but compressors of one kind."""
        return replace(self, compressors=tuple(c for c in self.compressors if isinstance(c, kind)))
