"""Which class every image of a source has, and which classes are wanted."""

from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_TRAIN = frozenset({"train", "training"})
_HELD_OUT = frozenset({"val", "valid", "validation", "test", "testing"})
LISTS = Path(__file__).parents[1] / "classes"


def read_class_list(given: str) -> frozenset[str]:
    """Return the classes of a list that comes with coldpress (``imagenet100``) or of a file, one a line.

    Nothing given: no class, which stands for all. Raises ValueError for a list that is not there or empty.
    """
    if not given:
        return frozenset()
    shipped = LISTS / f"{given}.txt"
    file = shipped if Path(given).name == given and shipped.is_file() else Path(given)
    try:
        lines = file.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        names = ", ".join(sorted(path.stem for path in LISTS.glob("*.txt")))
        raise ValueError(
            f"shard.classes: cannot read {file} ({error.strerror}); give {names} or a file of one class a line."
        ) from None
    classes = frozenset(line.strip() for line in lines if line.strip())
    if not classes:
        raise ValueError(f"shard.classes: {file} names no class; write one a line.")
    return classes


class Layout:
    """How deep below shared folders images lie, gathered name by name.

    `tar cf x.tar train` puts `train/` before every class; such leading folders are no classes.
    """

    def __init__(self) -> None:
        self._shared: str | None = None  # the folders that all names begin with, up to the last slash
        self._shallowest, self._deepest, self._flat = 1 << 30, 0, ""

    def add(self, name: str) -> None:
        """Take an image's name into account."""
        depth = name.count("/")
        if depth < self._shallowest:
            self._shallowest, self._flat = depth, name
        if depth > self._deepest:
            self._deepest = depth
        if self._shared is None:
            self._shared = name[: name.rfind("/") + 1]
        elif not name.startswith(self._shared):
            while not name.startswith(self._shared):
                self._shared = self._shared[: self._shared.rfind("/", 0, -1) + 1]

    @property
    def leading(self) -> int:
        """Return how many folders stand before the class of every image."""
        return max(0, min((self._shared or "").count("/"), self._shallowest - 1))

    def class_level(self) -> int | None:
        """Return which folder of a path is the class, None if there are no folders.

        Raises ValueError when some images lie in class folders and some do not.
        """
        if self._deepest == 0:
            return None
        if self._shallowest == 0:
            raise ValueError(f"mixes class folders with images outside them ({self._flat})")
        return self.leading


def folder_classes(names: Iterator[str], layout: Layout, wanted: frozenset[str]) -> Iterator[str | None]:
    """Yield the class folder of every image: the first one that is wanted, or not shared by all images.

    Raises ValueError when some images lie in class folders and some do not, and, at the end, when the folders are
    splits of a set: training images among those of a validation are worse than none.
    """
    return _wanted_folders(names, wanted) if wanted else _folders_at(layout.class_level(), names)


def _folders_at(level: int | None, names: Iterator[str]) -> Iterator[str | None]:
    folders: set[str] = set()
    for name in names:
        folder = None if level is None else name.split("/", level + 1)[level]
        if folder is not None:
            folders.add(folder)
        yield folder
    _refuse_splits(folders)


def _wanted_folders(names: Iterator[str], wanted: frozenset[str]) -> Iterator[str | None]:
    above: set[str] = set()
    for name in names:
        before = ""
        for part in name.split("/")[:-1]:
            if part in wanted:
                above.add(before)
                yield part
                break
            before = part
        else:
            yield None
    _refuse_splits(above)


def _refuse_splits(folders: set[str]) -> None:
    """Raise ValueError if some folders hold a set's training images and others its validation or test images."""
    lowered = {folder.lower(): folder for folder in folders}
    train, held_out = (sorted(lowered[name] for name in names & set(lowered)) for names in (_TRAIN, _HELD_OUT))
    if train and held_out:
        raise ValueError(f"holds {train[0]} and {held_out[0]}, which are splits and no classes; shard each on its own")


class ClassIds:
    """Class ids of images as they come, first by appearance, in the end by the order of the classes' names."""

    def __init__(self, wanted: frozenset[str]) -> None:
        self._wanted = wanted
        self._ids: dict[str | None, int] = {None: -1}
        self._labels = array("i")

    def add(self, label: str | None) -> None:
        """Append an image's label; one that is not wanted is none."""
        if self._wanted and label not in self._wanted:
            label = None
        self._labels.append(self._ids.setdefault(label, len(self._ids) - 1))

    def ordered(self, classes: tuple[str, ...] | None) -> tuple[tuple[str, ...], NDArray[np.int32]]:
        """Return the classes and every image's position in them, -1 for none, int32 [images].

        classes: all of them, in their order, where the source knows it. Else by name; numbers, if all are, by value.
        """
        names: Iterable[str] = [name for name in self._ids if name is not None]
        if classes is not None:
            ordered = tuple(name for name in classes if not self._wanted or name in self._wanted)
        else:
            ordered = tuple(sorted(names, key=_by_number if all(map(_is_number, names)) else None))
        place = {name: position for position, name in enumerate(ordered)}
        new_ids = np.array([*(place[name] for name in names), -1], np.int32)
        return ordered, new_ids[np.frombuffer(self._labels, np.int32)]


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def _by_number(name: str) -> tuple[int, str]:
    return int(name), name
