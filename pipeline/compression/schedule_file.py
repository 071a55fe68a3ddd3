"""A staged schedule as a file: `stages:`, a list of {until, patch_size, dropout}."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

import yaml

if TYPE_CHECKING:
    from pipeline.compression.schedule import Stage

# The schedules that ship are named without folder and ending.
SHIPPED = Path(__file__).resolve().parents[2] / "configs" / "schedule"
EXPECTED = "it must hold stages:, a list of {until: 0.5, patch_size: 24, dropout: 0.5}"
Entry = TypeVar("Entry")


def write_schedule(stages: Sequence[Stage], path: Path, comment_lines: Iterable[str]) -> None:
    """Write stages for `compression.file` to read, below comments that say where they come from."""
    comments = [f"# {line}".rstrip() for text in comment_lines for line in text.splitlines() or [""]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*comments, "stages:", *(f"  - {in_line(stage)}" for stage in stages)]) + "\n")


def in_line(stage: Stage) -> str:
    """Return a stage in one line that YAML and a command line read alike."""
    values: dict[str, Any] = {"until": stage.until, "patch_size": stage.patch_size, "dropout": stage.dropout}
    for name in ("key_patch_size", "key_dropout"):
        if getattr(stage, name) is not None:
            values[name] = getattr(stage, name)
    return str(yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=float("inf"))).strip()


def read_schedule(name: str, kind: type[Entry]) -> list[Entry]:
    """Return the stages of a file, or of the schedule that ships by that name; `kind` is what a stage is.

    Raises:
        ValueError: there is no such file, or it holds anything but stages.
    """
    path = locate(name)
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(_missing(path, error)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"compression.file: {path} is no YAML; {EXPECTED}.") from error
    if not isinstance(content, dict) or not isinstance(content.get("stages"), list):
        raise ValueError(f"compression.file: {path} is no schedule; {EXPECTED}.")
    _check_keys(f"{path}:", content, {"stages"})
    return [_entry(f"{path}: stages[{i}]", values, kind) for i, values in enumerate(content["stages"])]


def locate(name: str) -> Path:
    """Return the file that a name means: a bare word is a schedule that ships, all else a path."""
    bare = Path(name).name == name and not Path(name).suffix
    return SHIPPED / f"{name}.yaml" if bare else Path(name)


def _missing(path: Path, error: OSError) -> str:
    if path.parent != SHIPPED:
        return f"compression.file: {path} cannot be read ({error.strerror}); `coldpress analyze` writes such files."
    shipped = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.yaml")))
    return (
        f"compression.file: no schedule {path.stem} comes with coldpress; say one of {shipped}, "
        f"or ./{path.stem} for a file of your own."
    )


def _entry(place: str, values: Any, kind: type[Entry]) -> Entry:
    if not isinstance(values, dict):
        raise ValueError(f"compression.file: {place} is {values!r} and no stage; {EXPECTED}.")
    _check_keys(place, values, {entry.name for entry in fields(kind)})  # type: ignore[arg-type]
    hints = get_type_hints(kind)
    for key, value in values.items():
        if not _fits(value, hints[key]):
            rule = "a number" if _fits(0.5, hints[key]) else "a whole number"
            raise ValueError(f"compression.file: {place}.{key} must be {rule}, got {value!r}; {EXPECTED}.")
    return kind(**values)


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, hint) or (isinstance(value, int) and isinstance(0.5, hint))


def _check_keys(place: str, values: dict[Any, Any], known: set[str]) -> None:
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(sorted(known))}."
            raise ValueError(f"compression.file: {place} {key} is not a key; {hint}")
