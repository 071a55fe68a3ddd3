"""Two reports of one benchmark: which figures differ by more than both spreads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.benchmarks.machine import machine_facts
from pipeline.benchmarks.report import SCHEMA_VERSION, Column, Row, plain
from pipeline.benchmarks.timing import Spread

# Of a figure without a spread, such as a size: less is rounding.
EXACT = 0.01
# What tells machines apart; and what may differ: places, rounds, and how many rows there are.
_MACHINE = ("cpu", "usable_cores", "gpu")
_FREE = ("what", "output", "compare", "rounds", "patch_sizes", "dropouts", "methods", "ranks")


@dataclass(frozen=True)
class Change:
    """A figure of a row, before and after, in the column's own format."""

    case: str
    column: Column
    before: Spread
    after: Spread

    @property
    def worse(self) -> bool:
        """Return whether this is a regression."""
        return (self.after.median > self.before.median) == (self.column.better == "less")

    def __str__(self) -> str:
        before, after = (_shown(each, self.column.format) for each in (self.before, self.after))
        return f"{self.case}: {self.column.heading} {before} -> {after}"


class Baseline:
    """An earlier report of the same benchmark, or of several."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Read it.

        Raises:
            ValueError: it is no such report, or was measured on another machine or with other settings.
        """
        self.path = path
        content = _read(path)
        self.date: str = content["date"]
        self._reports: dict[str, Any] = content.get("reports") or {content["what"]: content}
        _check_machine(path, content["machine"])
        _check_settings(path, content["settings"], plain(settings))

    def __contains__(self, what: str) -> bool:
        return what in self._reports

    def rows(self, what: str) -> list[Row]:
        """Return the rows of a benchmark.

        Raises:
            ValueError: there are none.
        """
        if what not in self:
            raise ValueError(
                f"compare: {self.path} has {', '.join(self._reports)}, not what={what}; measure that first."
            )
        rows: list[Row] = self._reports[what]["rows"]
        return rows


def changes(columns: Sequence[Column], before: Sequence[Row], after: Sequence[Row]) -> list[Change]:
    """Return what differs beyond both spreads, in the rows that both have."""
    earlier = {_case(columns, row): row for row in before}
    pairs = [(case, earlier[case], row) for row in after if (case := _case(columns, row)) in earlier]
    return [each for case, old, new in pairs for each in _row_changes(case, columns, old, new)]


def verdict(baseline: Baseline, found: Sequence[Change]) -> str:
    """Say what has become worse, and what better."""
    worse, better = ([each for each in found if each.worse is is_worse] for is_worse in (True, False))
    lines = [
        f"Against {baseline.path} of {baseline.date}, beyond both spreads: {len(worse)} worse, {len(better)} better.",
        *(f"  worse   {each}" for each in worse),
        *(f"  better  {each}" for each in better),
    ]
    return "\n".join(lines)


def _row_changes(case: str, columns: Sequence[Column], old: Row, new: Row) -> Iterator[Change]:
    for column in columns:
        if column.better and None not in (old.get(column.key), new.get(column.key)):
            change = Change(case, column, _spread(old, column.key), _spread(new, column.key))
            if change.before.low > change.after.high or change.after.low > change.before.high:
                yield change


def _spread(row: Row, key: str) -> Spread:
    value = float(row[key])
    low, high = value * (1 - EXACT / 2), value * (1 + EXACT / 2)
    return Spread(value, float(row.get(f"{key}_low", low)), float(row.get(f"{key}_high", high)))


def _case(columns: Sequence[Column], row: Row) -> str:
    """Name a row by what is no measurement in it: texts and whole numbers that say what was measured."""
    named = dict.fromkeys(c.key for c in columns if c.format in ("", "d") and not c.better)
    return ", ".join(" ".join(str(row[key]).split()) for key in named if row.get(key) is not None)


def _shown(spread: Spread, form: str) -> str:
    middle, low, high = (
        format(each, form if form != "d" else ".0f") for each in (spread.median, spread.low, spread.high)
    )
    return f"{middle} [{low}-{high}]"


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"compare: {path} cannot be read as a report ({error}); name a file of output=FILE."
        ) from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"compare: {path} must have schema_version {SCHEMA_VERSION}, got {version}; measure it with this release."
        )
    return content


def _check_machine(path: Path, theirs: Mapping[str, Any]) -> None:
    ours = machine_facts()
    for name in _MACHINE:
        if theirs.get(name) != ours[name]:
            raise ValueError(
                f"compare: {path} is of another machine ({name}: {theirs.get(name)} there, {ours[name]} here); "
                "compare runs of one machine."
            )


def _check_settings(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    before, now = dict(_flat(theirs)), dict(_flat(ours))
    for key in before.keys() & now.keys():
        if before[key] != now[key] and key not in _FREE:
            raise ValueError(
                f"compare: {path} was measured with {key}={before[key]}, this is {key}={now[key]}; "
                "compare runs of the same settings."
            )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
