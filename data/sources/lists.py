"""Images named by a list: CSV, TSV or Parquet with a column `path` and, for labelled sets, a column `label`."""

import csv
import importlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from data.sources.entries import OWN_FILE, Entry, Found, Refused, normalized

PATH, LABEL = "path", "label"
LIST_SUFFIXES = (".csv", ".tsv", ".parquet")
_BATCH = 1 << 13  # rows of Parquet


def scan_list(file: Path) -> Iterator[Entry]:
    """Yield the images that a list names; paths are relative to the list's folder.

    Raises ValueError for a list without a path column and for one that cannot be read.
    """
    rows = _parquet_rows(file) if file.suffix.lower() == ".parquet" else _text_rows(file)
    for path, label in rows:
        yield _look(file.parent, path, label)


def _look(folder: Path, path: str, label: str | None) -> Entry:
    name = normalized(path)
    try:
        status = os.stat(folder / name)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        if path != path.strip():  # blanks beside a comma are rarely part of a name
            return _look(folder, path.strip(), label)
        return Refused(name, f"cannot be read ({getattr(error, 'strerror', None) or error})", label)
    if not stat.S_ISREG(status.st_mode):
        return Refused(name, "not a regular file", label)
    return Found(name, OWN_FILE, 0, status.st_size, status.st_mtime_ns, label)


def _text_rows(file: Path) -> Iterator[tuple[str, str | None]]:
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        # Without strict, a quote that is not closed makes one label of all that follows.
        rows = csv.DictReader(text, delimiter=delimiter, strict=True)
        whole = 0  # lines of whole rows; the reader's own count stands anywhere within the row that it stops at
        try:
            rows.fieldnames = [name.strip() for name in rows.fieldnames or []]
            _refuse_columns(file, rows.fieldnames)
            whole = rows.line_num
            for row in rows:
                if not (row[PATH] or "").strip() or None in row or None in row.values():
                    raise ValueError(f"shard.source: {file}, line {rows.line_num}: not one value for every column.")
                yield row[PATH], _label(row.get(LABEL, ""))
                whole = rows.line_num
        except (csv.Error, _LabelError) as error:
            raise ValueError(
                f"shard.source: {file}, line {whole + 1}: {error}; close every quote, and double those inside one."
            ) from None


class _LabelError(Exception):
    """A label that can only come of a quote that is not closed where it should be."""


def _label(given: str) -> str | None:
    if "\n" in given:
        raise _LabelError("a label of several lines")
    return given.strip() or None


def _parquet_rows(file: Path) -> Iterator[tuple[str, str | None]]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ValueError(
            f"shard.source: {file} is Parquet, which PyArrow reads; `pip install pyarrow`, or give the list as CSV."
        ) from None
    try:
        table = parquet.ParquetFile(file)
    except Exception as error:  # PyArrow's own errors can be named only where it is installed
        raise ValueError(f"shard.source: {file} is not Parquet ({error}).") from None
    _refuse_columns(file, table.schema_arrow.names)
    columns = [name for name in (PATH, LABEL) if name in table.schema_arrow.names]
    for batch in table.iter_batches(_BATCH, columns=columns):
        for row in batch.to_pylist():
            label = row.get(LABEL)
            yield str(row[PATH]), None if label is None else str(label)


def _refuse_columns(file: Path, names: Sequence[str]) -> None:
    if PATH not in names:
        found = ", ".join(map(str, names)) or "none"
        raise ValueError(
            f"shard.source: {file} has no column {PATH!r} (columns: {found}); name the columns {PATH},{LABEL} in its "
            "first row."
        )
