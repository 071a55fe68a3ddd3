"""Classes of images that lie in no class folders, such as ImageNet's validation set.

A file of labels is one of
- ImageNet's devkit (`ILSVRC2012_devkit_t12.tar.gz`, its unpacked folder, or the ground truth inside that);
- lines `image class` (.csv: comma, .tsv: tab, else blanks), images by path, file name, or file name without suffix;
- lines of one class each, for the images in the order of their names.
"""

import csv
import importlib
import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
SYNSETS = "meta.mat"
_DELIMITERS = {".csv": ",", ".tsv": "\t"}  # else blanks
REMEDY = "give ILSVRC2012_devkit_t12.tar.gz, or a file of lines `image class`"


class LabelFile:
    """Classes by the names of images, or in the order of the images' names."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError for a file that is none of the above."""
        self.path = path
        self._by_name: dict[str, str] = {}
        self._in_order: list[str] = []
        if not path.exists():
            raise ValueError(f"shard.labels: no such file or folder {path}; {REMEDY}.")
        if path.is_dir() or path.name == GROUND_TRUTH or _is_archive(path):
            self._in_order = _devkit_labels(path)
        else:
            self._read_lines()

    def labels(self, names: Iterable[str]) -> Iterator[str]:
        """Yield the class of every image. Raises ValueError for one that has none."""
        if self._in_order:
            names = list(names)
            self._by_name = self._ordered(set(names))
        for name in names:
            label = self.find(name)
            if label is None:
                raise ValueError(f"shard.labels: {self.path} has no class for {name}; {self._remedy(name)}.")
            yield label

    def find(self, name: str) -> str | None:
        """Return the class of an image by its path, file name, or file name without suffix, None for none."""
        path = PurePosixPath(name)
        return next((self._by_name[n] for n in (name, path.name, path.stem) if n in self._by_name), None)

    def _remedy(self, name: str) -> str:
        if " " in name and self.path.suffix.lower() not in _DELIMITERS:
            return "image names with blanks need a .csv or .tsv of image,class, for blanks end them here"
        return REMEDY

    def _ordered(self, names: set[str]) -> dict[str, str]:
        if len(names) != len(self._in_order):
            raise ValueError(
                f"shard.labels: {self.path} has {len(self._in_order)} lines of one class each, the source has "
                f"{len(names)} images; {REMEDY}."
            )
        return dict(zip(sorted(names), self._in_order, strict=True))

    def _read_lines(self) -> None:
        rows = list(_rows(self.path))
        widths = {min(len(row), 2) for row in rows}
        if widths == {2}:
            self._add_named(rows)
        elif widths == {1}:
            self._in_order = [label for (label,) in rows]
        else:
            raise ValueError(f"shard.labels: {self.path} has lines of one field and of more, or none; {REMEDY}.")

    def _add_named(self, rows: list[list[str]]) -> None:
        for image, label, *_ in rows:
            name = image.removeprefix("./")
            known = self._by_name.setdefault(name, label)
            if known != label:
                raise ValueError(
                    f"shard.labels: {self.path} gives {name} two classes, {known} and {label}; keep one of its lines."
                )


def _rows(path: Path) -> Iterator[list[str]]:
    """Yield the fields of every line that is not empty."""
    delimiter = _DELIMITERS.get(path.suffix.lower())
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        split = (line.split(maxsplit=1) for line in text)
        lines = csv.reader(text, delimiter=delimiter, strict=True) if delimiter else split
        try:
            for fields in filter(None, lines):
                if any("\n" in field.strip() for field in fields):
                    raise csv.Error(f"a field of several lines, {fields[0][:40]!r}")
                yield [field.strip() for field in fields]
        except csv.Error as error:
            raise ValueError(f"shard.labels: cannot read {path} ({error}); close every quote.") from None


def _devkit_labels(path: Path) -> list[str]:
    """Return the wnid of every validation image: the ground truth's numbers, named by the devkit's synsets."""
    truth, synsets = _devkit_files(path)
    wnids = _wnids(synsets, path)
    try:
        return [wnids[int(number)] for number in truth.split()]
    except (ValueError, KeyError) as error:
        raise ValueError(f"shard.labels: the ground truth in {path} names no synset ({error}); {REMEDY}.") from None


def _devkit_files(path: Path) -> tuple[bytes, bytes]:
    """Return the content of the devkit's ground truth and of its table of synsets."""
    found = _archived(path) if _is_archive(path) else _unpacked(path)
    missing = {GROUND_TRUTH, SYNSETS} - set(found)
    if missing:
        raise ValueError(f"shard.labels: no {' and no '.join(sorted(missing))} in or beside {path}; {REMEDY}.")
    return found[GROUND_TRUTH], found[SYNSETS]


def _is_archive(path: Path) -> bool:
    return path.name.lower().endswith((".tar.gz", ".tgz", ".tar"))


def _archived(path: Path) -> dict[str, bytes]:
    found = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name = PurePosixPath(member.name).name
                if name in (GROUND_TRUTH, SYNSETS) and (stream := tar.extractfile(member)) is not None:
                    found[name] = stream.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"shard.labels: cannot read {path} ({error}); {REMEDY}.") from None
    return found


def _unpacked(path: Path) -> dict[str, bytes]:
    folder, patterns = (path, ("", "data/", "*/data/")) if path.is_dir() else (path.parent, ("",))
    places = [p for name in (GROUND_TRUTH, SYNSETS) for pattern in patterns for p in folder.glob(pattern + name)]
    return {place.name: place.read_bytes() for place in places}


def _wnids(synsets: bytes, path: Path) -> dict[int, str]:
    """Read the wnid of every number from the devkit's meta.mat."""
    try:
        scipy_io: Any = importlib.import_module("scipy.io")
    except ImportError:
        raise ValueError(
            f"shard.labels: {SYNSETS} in {path} is a MATLAB file, which SciPy reads; `pip install scipy`, or give a "
            "file of lines `image class`."
        ) from None
    try:
        rows = scipy_io.loadmat(io.BytesIO(synsets), squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
    except Exception as error:  # SciPy raises almost anything for a damaged file
        raise ValueError(f"shard.labels: {SYNSETS} in {path} is not the devkit's ({error}); {REMEDY}.") from None
