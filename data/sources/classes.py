"""Which class every image of a source has, and which classes are wanted."""

from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

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


def folder_classes(names: Callable[[], Iterator[str]], wanted: frozenset[str]) -> Iterator[str | None]:
    """Yield the class folder of every image: the first one that is wanted, or not shared by all images.

    `tar cf x.tar train` puts `train/` before every class; such leading folders are no classes.
    Raises ValueError when some images lie in class folders and some do not.
    """
    if wanted:
        return (next((part for part in name.split("/")[:-1] if part in wanted), None) for name in names())
    level = _class_level(names())
    return (None if level is None else name.split("/", level + 1)[level] for name in names())


def _class_level(names: Iterator[str]) -> int | None:
    """Return which folder of a path is the class, None if there are no folders."""
    shared: list[str] | None = None
    shallowest, deepest, flat = 1 << 30, 0, ""
    for name in names:
        depth = name.count("/")
        if depth < shallowest:
            shallowest, flat = depth, name
        deepest = max(deepest, depth)
        shared = _shared(shared, name)
    if deepest == 0:
        return None
    if shallowest == 0:
        raise ValueError(f"mixes class folders with images outside them ({flat})")
    return max(0, min(len(shared or []), shallowest - 1))


def _shared(shared: list[str] | None, name: str) -> list[str]:
    """Return the leading folders that a path has in common with those so far."""
    if shared == []:
        return shared
    folders = name.split("/")[:-1]
    if shared is None:
        return folders
    same = 0
    while same < min(len(shared), len(folders)) and shared[same] == folders[same]:
        same += 1
    return shared[:same]


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

    def ordered(self, classes: tuple[str, ...] | None, numbered: bool) -> tuple[tuple[str, ...], NDArray[np.int32]]:
        """Return the classes and every image's position in them, -1 for none, int32 [images].

        classes: all of them, in their order, where the source knows it. numbered: names that are numbers go by value.
        """
        names: Iterable[str] = [name for name in self._ids if name is not None]
        if classes is not None:
            ordered = tuple(name for name in classes if not self._wanted or name in self._wanted)
        else:
            ordered = tuple(sorted(names, key=_by_number if numbered and all(map(_is_number, names)) else None))
        place = {name: position for position, name in enumerate(ordered)}
        new_ids = np.array([*(place[name] for name in names), -1], np.int32)
        return ordered, new_ids[np.frombuffer(self._labels, np.int32)]


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def _by_number(name: str) -> tuple[int, str]:
    return int(name), name
