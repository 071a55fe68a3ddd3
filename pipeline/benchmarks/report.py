"""What a benchmark found: rows for tables and for JSON, and sentences that say what they mean."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

from pipeline.benchmarks.machine import machine_facts

# 2: rows of what=step have numbers for patch size and dropout, and smallest and largest values in place of a spread;
# what=all has the reports of several benchmarks.
SCHEMA_VERSION = 2

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of the printed table: the key in a row, its heading, its number format; without one it is text.

    `better`: "less" or "more", where a change of the value is one to the better or the worse.
    """

    key: str
    heading: str
    format: str = ""
    better: str = ""

    def cell(self, row: Row) -> str:
        """Return a row's value as text; empty where the row has none."""
        value = row.get(self.key)
        return "" if value is None else format(value, self.format)


@dataclass(frozen=True)
class Report:
    """columns: what of the rows is printed; notes: sentences below; facts: what JSON holds besides.

    further: the columns of more tables over the same rows, where these have something in them.
    """

    columns: Sequence[Column]
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    further: Sequence[Sequence[Column]] = ()

    def table(self) -> str:
        """Return rows and notes as aligned text."""
        tables = [_table(columns, self.rows) for columns in (self.columns, *self.further)]
        return "\n\n".join([*tables, *(["\n".join(self.notes)] if self.notes else [])])

    @property
    def all_columns(self) -> list[Column]:
        """Return the columns of all tables."""
        return [column for columns in (self.columns, *self.further) for column in columns]

    def content(self) -> dict[str, Any]:
        """Return what JSON holds of this report."""
        return {**self.facts, "rows": [dict(row) for row in self.rows], "notes": list(self.notes)}

    def write(self, path: Path, what: str, settings: Mapping[str, Any], command: str = "") -> None:
        """Write everything as JSON, with the machine it was measured on."""
        write_json(path, heading(what, settings, command) | self.content())


def heading(what: str, settings: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Return what a file of reports begins with."""
    return {
        "schema_version": SCHEMA_VERSION,
        "what": what,
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine_facts(),
        "settings": plain(settings),
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file of reports."""
    path.write_text(json.dumps(content, indent=1, default=_plain) + "\n", encoding="utf-8")


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as JSON gives them back."""
    read: dict[str, Any] = json.loads(json.dumps(settings, default=_plain))
    return read


def _table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    shown = [c for c in columns if not c.format or any(row.get(c.key) is not None for row in rows)]
    cells = [[c.heading for c in shown], *([c.cell(row) for c in shown] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(_aligned, shown, line, widths)).rstrip() for line in cells)


def _plain(value: object) -> str:
    return value.name if isinstance(value, Enum) else str(value)


def _aligned(column: Column, cell: str, width: int) -> str:
    """Align text to the left, numbers to the right."""
    return cell.rjust(width) if column.format else cell.ljust(width)
