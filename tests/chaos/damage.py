"""What can happen to a file of a checkpoint while nobody writes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random


def truncate(file: Path, draw: Random) -> None:
    """Cut a file somewhere; power cuts like to leave nothing at all."""
    size = file.stat().st_size
    with file.open("r+b") as content:
        content.truncate(draw.choice((0, draw.randrange(size))))


def flip(file: Path, draw: Random) -> None:
    """Flip one bit."""
    with file.open("r+b") as content:
        where = draw.randrange(file.stat().st_size)
        content.seek(where)
        byte = content.read(1)[0]
        content.seek(where)
        content.write(bytes([byte ^ 1 << draw.randrange(8)]))


def delete(file: Path, draw: Random) -> None:
    """Lose a file."""
    file.unlink()


DAMAGES: dict[str, Callable[[Path, Random], None]] = {"truncate": truncate, "flip": flip, "delete": delete}
