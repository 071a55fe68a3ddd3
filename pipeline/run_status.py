"""What a run's directory tells of the run from outside: read only, quickly, whatever state its files are in."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.status_file import STATUS_NAME, State, Status, read_status

CONFIG_NAME = "config.yaml"
# Reports from the end of metrics.jsonl among which the newest numbers are looked for.
TAIL_BYTES = 128 * 1024
NUMBERS = ("progress_ratio", "eta_seconds", "samples_per_second", "loss", "knn_top1_ratio", "step")


@dataclass(frozen=True)
class RunStatus:
    """One run as others see it; numbers that nobody has said are None, ages in seconds."""

    run: str
    # A `State`, or `starting` before the run has said one, or `unreadable`.
    state: str
    # The run says that it is running, and nothing was heard of it for too long.
    alarm: bool = False
    # What ended it, what is wrong with its files, or where it was last heard of.
    reason: str = ""
    step: int | None = None
    progress: float | None = None
    eta_seconds: float | None = None
    samples_per_second: float | None = None
    loss: float | None = None
    # Of the last probe, and the best of the newest evaluation.
    knn_top1: float | None = None
    evaluated_top1: float | None = None
    checkpoint: str = ""
    checkpoint_age: float | None = None
    heard_age: float | None = None


def run_directories(runs: Path) -> Iterator[Path]:
    """Yield every run directly below a folder, and what may not be looked into: it may be one."""
    for entry in os.scandir(runs):
        if entry.name.startswith(".") or not entry.is_dir():
            continue
        if os.path.exists(os.path.join(entry.path, CONFIG_NAME)) or not os.access(entry.path, os.R_OK | os.X_OK):
            yield Path(entry.path)


def look_at(directory: Path, silent_seconds: float) -> RunStatus:
    """Return what there is to know of a run; files that cannot be read are named in its reason."""
    now = time.time()
    problems: list[str] = []
    status = _said(directory, problems)
    numbers = newest_numbers(directory / "metrics.jsonl", NUMBERS, problems)
    checkpoint, saved = _checkpoint(directory)
    heard = _last_heard(directory, status)
    steps = [int(numbers["step"])] if "step" in numbers else []
    found = RunStatus(
        run=directory.name,
        state="unreadable" if problems else status.state.value if status else "starting",
        reason="; ".join(problems) or (status.reason if status else ""),
        step=max([*steps, *([status.step] if status else [])], default=None),
        progress=numbers.get("progress_ratio"),
        eta_seconds=_finite(numbers.get("eta_seconds")),
        samples_per_second=numbers.get("samples_per_second"),
        loss=numbers.get("loss"),
        knn_top1=numbers.get("knn_top1_ratio"),
        evaluated_top1=newest_evaluation(directory / "eval"),
        checkpoint=checkpoint,
        checkpoint_age=saved and max(0.0, now - saved),
        heard_age=heard and max(0.0, now - heard),
    )
    alive = status.state is State.running if status else not problems
    silent = found.heard_age is not None and found.heard_age > silent_seconds
    return _with_alarm(found, directory) if alive and silent else found


def _with_alarm(found: RunStatus, directory: Path) -> RunStatus:
    told = f"says it is running, nothing heard for {found.heard_age:,.0f} s{_whereabouts(directory)}"
    return replace(found, alarm=True, reason="; ".join(filter(None, (told, found.reason))))


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _said(directory: Path, problems: list[str]) -> Status | None:
    try:
        return read_status(directory)
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.append(f"{STATUS_NAME}: {error.strerror}")
    except ValueError as error:
        problems.append(f"{STATUS_NAME} is damaged ({error})")
    return None


def newest_numbers(path: Path, names: Iterable[str], problems: list[str]) -> dict[str, float]:
    """Return the newest value of each of these metrics among the last reports, null as nan; note what is unreadable."""
    missing = set(names)
    found: dict[str, float] = {}
    try:
        lines = _tail(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        problems.append(f"{path.name}: {error.strerror}")
        return {}
    for number, line in enumerate(reversed(lines)):
        if not any(f'"{name}"'.encode() in line for name in missing):
            continue
        try:
            row = json.loads(line)
            values = {name: math.nan if row[name] is None else float(row[name]) for name in missing & row.keys()}
        except (ValueError, TypeError, AttributeError):
            # The last line may be half written; any other one is not what the run wrote.
            if number:
                problems.append(f"{path.name} has a line that is no report")
                return found
            continue
        missing -= row.keys()
        found |= values
        if not missing:
            break
    return found


def _tail(path: Path) -> list[bytes]:
    """Return the last lines of a file, the first of them whole."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().splitlines()
    return lines[1:] if size > TAIL_BYTES else lines


def _checkpoint(directory: Path) -> tuple[str, float | None]:
    """Return the name of the newest checkpoint and when it was published."""
    latest = directory / "checkpoints" / "latest"
    try:
        return latest.read_text().strip(), latest.stat().st_mtime
    except (OSError, ValueError):
        return "", None


def newest_evaluation(directory: Path) -> float | None:
    """Return the best accuracy in the newest evaluation, None if there is none that can be read."""
    try:
        newest = max(directory.glob("*.json"), key=lambda path: path.stat().st_mtime, default=None)
        return max((n for _, n in figures(json.loads(newest.read_text())["top1"])), default=None) if newest else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def figures(content: object, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield every finite number in nested mappings, named by the keys that lead to it."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from figures(value, f"{name} {key}".strip())
    elif isinstance(content, int | float) and not isinstance(content, bool) and math.isfinite(content):
        yield name, float(content)


def _last_heard(directory: Path, status: Status | None) -> float | None:
    """Return when the main process last left a trace, by the clock of the file system."""
    times = [status.time] if status else []
    for name in ("heartbeats/rank_00000.json", "metrics.jsonl", STATUS_NAME, CONFIG_NAME):
        try:
            times.append((directory / name).stat().st_mtime)
        except OSError:
            continue
    return max(times, default=None)


def _whereabouts(directory: Path) -> str:
    """Say where the main process was when its heartbeat was last written, nothing if that is not known."""
    try:
        beat = json.loads((directory / "heartbeats" / "rank_00000.json").read_text())
        return f"; last in {beat['phase']} after step {beat['step']}, pid {beat['pid']} on {beat['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
