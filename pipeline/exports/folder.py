"""A folder that is there whole or not at all, and never in the place of another."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.checkpoint_files import sync, temporary_of


@contextmanager
def published(output: Path) -> Iterator[Path]:
    """Yield a folder to fill with files; it gets its name once all of it is on the disk.

    Raises:
        ValueError: there is something of that name, or somebody is writing it.
    """
    if output.exists():
        raise _refusal(output)
    temporary = temporary_of(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.mkdir()
    except FileExistsError as error:
        raise ValueError(
            f"output: {temporary} is there, so another export to {output} goes on or was killed; "
            "wait for it or delete that, or give another output=DIR."
        ) from error
    try:
        yield temporary
        _rename(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _rename(temporary: Path, output: Path) -> None:
    for path in temporary.iterdir():
        sync(path)
    sync(temporary)
    try:
        temporary.rename(output)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _refusal(output) from error
        raise
    sync(output.parent)


def _refusal(output: Path) -> ValueError:
    return ValueError(f"output: {output} exists; delete it, or give another output=DIR.")
