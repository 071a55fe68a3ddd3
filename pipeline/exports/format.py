"""What a format of an export is to the rest of the house."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.exports.encoder import Encoder
from pipeline.exports.form import Form


def _nothing_missing() -> None:
    """Refuse nothing."""


@dataclass(frozen=True)
class Format:
    """A way to write an encoder down, and what its readers have to do."""

    # Fills a folder.
    write: Callable[[Encoder, Form, Path], None]
    # Returns Python that is run in the folder and ends with `features` [1, D], or a classifier's `logits` [1, C], of
    # `images` [1, 3, S, S].
    how_to_load: Callable[[Encoder, Form], str]
    # Of the readers, as model hubs name it; empty where they know no name.
    library: str = ""
    # Raises ValueError where packages are missing.
    check: Callable[[], None] = _nothing_missing
