"""What a benchmark found: rows for a table and for JSON, and sentences that say what they mean."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

from pipeline.benchmarks.machine import machine_facts

SCHEMA_VERSION = 1

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of the printed table: the key in a row, its heading, its number format; without one it is text."""

    key: str
    heading: str
    format: str = ""

    def cell(self, row: Row) -> str:
        """Return a row's value as text; empty where the row has none."""
        value = row.get(self.key)
        return "" if value is None else format(value, self.format)


@dataclass(frozen=True)
class Report:
    """columns: what of the rows is printed; notes: sentences below the table; facts: what JSON holds besides."""

    columns: Sequence[Column]
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def table(self) -> str:
        """Return rows and notes as aligned text."""
        cells = [[c.heading for c in self.columns], *([c.cell(row) for c in self.columns] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(_aligned, self.columns, line, widths)).rstrip() for line in cells]
        return "\n".join([*lines, *([""] if self.notes else []), *self.notes])

    def write(self, path: Path, what: str, settings: Mapping[str, Any]) -> None:
        """Write everything as JSON, with the machine it was measured on."""
        content = {
            "schema_version": SCHEMA_VERSION,
            "what": what,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine_facts(),
            "settings": dict(settings),
            **self.facts,
            "rows": [dict(row) for row in self.rows],
            "notes": list(self.notes),
        }
        path.write_text(json.dumps(content, indent=1, default=_plain) + "\n", encoding="utf-8")


def _plain(value: object) -> str:
    return value.name if isinstance(value, Enum) else str(value)


def _aligned(column: Column, cell: str, width: int) -> str:
    """Align text to the left, numbers to the right."""
    return cell.rjust(width) if column.format else cell.ljust(width)
