"""What must hold of a chain: every life ended as it may, every sample came in its place, the end is the same."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from chaos.events import Ending
from chaos.life import Life
from chaos.run_files import RunFiles
from chaos.tiny_run import BATCH, STEPS
from torch import Tensor

# Other sums in another order, where the number of processes or the engine changed.
TOLERANCE = 1e-5


class Seen(TypedDict):
    """What one process was given for one step."""

    step: int
    places: list[int]
    pixels: list[list[int]]


@dataclass(frozen=True)
class Reference:
    """The uninterrupted run."""

    networks: Path
    losses: list[tuple[int, float]]
    pixels: dict[int, list[int]]


def read_record(path: Path) -> list[Seen]:
    """Return what a process was given, step by step; a line that was torn by its death is no step."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def pixels_of(life: Life) -> dict[int, list[int]]:
    """Return the checksums of every place's views."""
    seen = (each for rank in range(life.setting.ranks) for each in read_record(life.record_of(rank)))
    return {place: pixels for each in seen for place, pixels in zip(each["places"], each["pixels"], strict=True)}


def ended_wrong(life: Life, ending: Ending) -> Iterator[str]:
    """Yield what is wrong with how a life ended that did not finish."""
    codes = sorted(set(life.codes.values()))
    outputs = [life.log_of(rank).read_text(errors="replace") for rank in range(life.setting.ranks)]
    # Who lost a peer sees a broken connection, and can say no more than that.
    bereaved = codes[0] < 0
    if not bereaved and (not set(codes) <= {0, *ending.codes}):
        yield f"exit codes {codes}, expected {ending.codes}"
    if not bereaved and any("Traceback" in output for output in outputs):
        yield "a traceback where a sentence is due"
    if any(codes) and ending.says_why() and not any("coldpress: " in output for output in outputs):
        yield "no sentence says why it ended"


def samples_wrong(life: Life, resumes_at: int, reference: Reference) -> Iterator[str]:
    """Yield the first step of each process that took other samples, or other pixels, than planned."""
    for rank in range(life.setting.ranks):
        for step, seen in enumerate(read_record(life.record_of(rank)), start=resumes_at):
            wrong = _sample_wrong(seen, step, rank, life.setting.ranks, reference)
            if wrong:
                yield f"process {rank}, step {step}: {wrong}"
                break


def _sample_wrong(seen: Seen, step: int, rank: int, ranks: int, reference: Reference) -> str:
    if seen["step"] != step:
        return f"took step {seen['step']}"
    if seen["places"] != list(range(step * BATCH + rank, (step + 1) * BATCH, ranks)):
        return f"was given {seen['places']}"
    if seen["pixels"] != [reference.pixels[place] for place in seen["places"]]:
        return "saw other pixels"
    return ""


def steps_missing(lives: list[Life]) -> Iterator[str]:
    """Yield the steps that do not count once: the last life that took one did not take all of its batch."""
    last: dict[int, list[int]] = {}
    for life in lives:
        of_life: dict[int, list[int]] = {}
        for rank in range(life.setting.ranks):
            for seen in read_record(life.record_of(rank)):
                of_life.setdefault(seen["step"], []).extend(seen["places"])
        last |= of_life
    planned = {step: list(range(step * BATCH, (step + 1) * BATCH)) for step in range(STEPS)}
    wrong = [step for step, places in planned.items() if sorted(last.get(step, [])) != places]
    if wrong:
        yield f"what counts of steps {wrong} is not their batch"


def end_wrong(networks: Path, files: RunFiles, reference: Reference, *, exact: bool) -> Iterator[str]:
    """Yield what of a finished run differs from the uninterrupted one."""
    tolerance = 0.0 if exact else TOLERANCE
    ours, theirs = files.losses(), reference.losses
    if [step for step, _ in ours] != [step for step, _ in theirs]:
        yield f"metrics have the steps {[step for step, _ in ours]}"
    elif not all(abs(a - b) <= tolerance for (_, a), (_, b) in zip(ours, theirs, strict=True)):
        yield "other losses"
    if files.unpublished():
        yield f"left behind: {[path.name for path in files.unpublished()]}"
    yield from networks_differ(networks, reference.networks, tolerance)


def networks_differ(ours: Path, theirs: Path, tolerance: float) -> Iterator[str]:
    """Yield the parts whose final tensors are not those of the uninterrupted run."""
    if not ours.exists():
        yield "no final networks"
        return
    first, second = torch.load(ours), torch.load(theirs)
    for part in ("weights", "momentum"):
        assert first[part], f"no tensors in {part}"
        if first[part].keys() != second[part].keys():
            yield f"other tensors in {part}"
            continue
        gaps = {name: _gap(name, first[part][name], value, tolerance) for name, value in second[part].items()}
        name = max(gaps, key=gaps.__getitem__)
        # Not "gap > tolerance": nan differs, too.
        if not all(gap <= tolerance for gap in gaps.values()):
            yield f"other {part}: {name} by {gaps[name]:.1e}, tolerance {tolerance:g}"


def _gap(name: str, ours: Tensor, theirs: Tensor, tolerance: float) -> float:
    """Return the largest difference; where rounding may differ, of what has a gradient besides rounding.

    A bias of the keys shifts all scores of a query alike, and one before the heads' batch norm is subtracted there:
    their gradients are zero but for rounding, of which Adam makes whole steps.
    """
    if ours.shape != theirs.shape:
        return math.inf
    gap = (ours - theirs).abs()
    if tolerance and name == "encoder.norm.bias":
        return 0.0
    if tolerance and name.endswith("qkv.bias"):
        query, _, value = gap.chunk(3)
        gap = torch.cat([query, value])
    return float(gap.max())
