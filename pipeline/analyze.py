"""Command: how far compressed gradients are from the true one over a run, and the schedule that follows."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.loader import Batch, Loader
from pipeline import distributed
from pipeline.analysis.measure import grid, measure
from pipeline.analysis.results import Analysis, Panel, panel_from, write
from pipeline.analysis.selection import Choice, choose, stages
from pipeline.analysis_plots import draw
from pipeline.checkpoint_files import checkpoints, find_damage, progress_of
from pipeline.compose import load
from pipeline.compression import NoCompression
from pipeline.compression.schedule import Cell
from pipeline.compression.schedule_file import in_line, write_schedule
from pipeline.config import AnalyzeConfig, TrainConfig
from pipeline.distributed import World
from pipeline.methods import check_compressible
from pipeline.networks import networks
from pipeline.parts import build_schedules
from pipeline.run_directory import read_overrides

# At the very end the rate of the last layer is zero, and it would count as one that still waits.
LAST = 1 - 1e-6
FOLDER = "analysis"
# What does not change a schedule: where files lie and how many passes are taken.
INCIDENTAL = {"runs", "shards", "cells_at_once"}
# Further from an asked progress than this, a checkpoint is worth a warning.
NEAR = 0.05

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """A checkpoint to analyze, for an asked progress; no checkpoint is before the first step."""

    asked: float
    progress: float
    checkpoint: Path | None

    @property
    def name(self) -> str:
        """Return the checkpoint's name."""
        return self.checkpoint.name if self.checkpoint else "init"


def run(config: AnalyzeConfig) -> None:
    """Measure every panel, or take it from an earlier call that was stopped; write results, schedule and pictures.

    Raises:
        ValueError: no such run, cells that its model cannot take, sub-batches that its processes cannot share.
    """
    directory = Path(config.runs) / config.run
    training = baseline(config, directory)
    cells = grid(config.patch_sizes, config.dropouts, training.model)
    points = nearest(config.points, directory / "checkpoints")
    world = distributed.start()
    panels = [_panel(config, training, directory, point, cells, world) for point in points]
    if world.is_main:
        _report(config, training, directory, panels)


def baseline(config: AnalyzeConfig, directory: Path) -> TrainConfig:
    """Return the run's config without its compression, its blocks not compiled for the many shapes to come."""
    training: TrainConfig = load("train", read_overrides(directory))
    check_compressible(training.method)
    data = replace(training.data, shards=config.shards or training.data.shards)
    model = replace(training.model, compile=False)
    return replace(training, data=data, model=model, compression=NoCompression())


def nearest(asked: list[float], directory: Path) -> list[Point]:
    """Return the whole checkpoint nearest to each asked progress, each once.

    Raises:
        ValueError: the nearest one is damaged.
    """
    there = [Point(0.0, 0.0, None), *(Point(0.0, progress_of(c), c) for c in checkpoints(directory))]
    points: dict[str, Point] = {}
    for progress in sorted(asked):
        point = replace(min(there, key=lambda p: abs(p.progress - progress)), asked=progress)
        if abs(point.progress - progress) > NEAR:
            log.warning(
                "no checkpoint near %.0f %%: taking %s at %.1f %%; train with checkpoint.milestones=%s for later ones",
                100 * progress,
                point.name,
                100 * point.progress,
                str([milestone for milestone in asked if milestone]).replace(" ", ""),
            )
        damage = find_damage(point.checkpoint) if point.checkpoint else None
        if damage:
            raise ValueError(f"run: checkpoint {point.checkpoint} is damaged ({damage}); remove it, or ask elsewhere.")
        points.setdefault(point.name, point)
    return list(points.values())


def _panel(
    config: AnalyzeConfig, training: TrainConfig, directory: Path, point: Point, cells: list[Cell], world: World
) -> Panel:
    """Return one panel, in passes over as many cells as fit at once."""
    step = config.cells_at_once or len(cells)
    passes = [cells[i : i + step] for i in range(0, len(cells), step)]
    parts = []
    for number, some in enumerate(passes, start=1):
        path = directory / FOLDER / "parts" / f"{point.name}-{number}of{len(passes)}.json"
        settings = _settings(config, training, point, some)
        part = distributed.from_main(_stored(path, settings) if world.is_main else None)
        if part is None:
            part = _measured(config, training, point, some, world)
            if world.is_main:
                _store(path, settings, part)
        parts.append(part)
    return replace(parts[0], cells=[cell for part in parts for cell in part.cells])


def _measured(config: AnalyzeConfig, training: TrainConfig, point: Point, cells: list[Cell], world: World) -> Panel:
    method = networks(training, point.checkpoint).to(world.device)
    method.prepare(world.device, torch.float32)
    plan = build_schedules(training, method).at(min(point.progress, LAST))
    loader = Loader(
        training.data,
        method.views(),
        seed=config.seed,
        batch_size=config.sub_batch,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
    )
    title = f"{point.name} ({point.progress:.0%})"
    try:
        batches = _shown(loader.batches(0, config.samples), config.samples // config.sub_batch, title, world)
        errors = measure(method, batches, plan, cells, config.sub_batch)
    finally:
        loader.close()
    return Panel(
        asked=point.asked,
        progress=point.progress,
        checkpoint=point.name,
        frozen_layers=plan.frozen_layers,
        parameters=errors.parameters,
        budget=config.budget or training.batch_size * method.sample_cost(plan),
        squared_gradient=errors.reference.squared_expectation(),
        squared_gradient_plugin=errors.reference.squared_mean(),
        squared_gradient_without=errors.reference.squared_expectation_without().tolist(),
        cells=errors.cells,
    )


def _shown(batches: Iterator[Batch], total: int, title: str, world: World) -> Iterator[Batch]:
    """Yield batches under a progress bar, where there is a terminal."""
    disable = None if world.is_main else True
    yield from tqdm(batches, desc=f"analyzing {title}", total=total, unit=" sub-batches", disable=disable)
    if world.is_main:
        log.info("analyzed %s: %d sub-batches", title, total)


def _settings(config: AnalyzeConfig, training: TrainConfig, point: Point, cells: list[Cell]) -> dict[str, Any]:
    """Return what a stored part must have been measured with to be taken for this one."""
    return {
        "samples": config.samples,
        "sub_batch": config.sub_batch,
        "budget": config.budget,
        "seed": config.seed,
        "shards": training.data.shards,
        "color": training.data.color,
        "progress": point.progress,
        "cells": [[cell.patch_size, cell.dropout] for cell in cells],
    }


def _stored(path: Path, settings: dict[str, Any]) -> Panel | None:
    try:
        stored = json.loads(path.read_text())
        if stored["settings"] != settings:
            return None
        panel = panel_from(stored["panel"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    log.info("%s: measured earlier", path.stem)
    return panel


def _store(path: Path, settings: dict[str, Any], panel: Panel) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"settings": settings, "panel": asdict(panel)}))
    temporary.replace(path)


def _report(config: AnalyzeConfig, training: TrainConfig, directory: Path, panels: list[Panel]) -> None:
    analysis = Analysis(
        run=config.run,
        method=type(training.method).__name__.removesuffix("Config"),
        image_size=training.model.image_size,
        patch_size=training.model.patch_size,
        samples=config.samples,
        sub_batch=config.sub_batch,
        origin={
            "train": read_overrides(directory),
            "analyze": asdict(config),
            "date": datetime.now(UTC).date().isoformat(),
            "torch": torch.__version__,
        },
        panels=panels,
    )
    choices = choose(analysis, config.selection)
    schedule = stages(choices)
    folder = directory / FOLDER
    write(analysis, folder / "gradient_error.json")
    write_schedule(schedule, folder / "schedule.yaml", _origin(analysis))
    draw(analysis, choices, config.selection.confidence, folder)
    print(table(analysis, choices))
    print("\n".join(["schedule:", *(f"  - {in_line(stage)}" for stage in schedule)]))
    log.info(
        "written: %s and schedule.yaml, for compression=staged compression.file=PATH", folder / "gradient_error.json"
    )


def _origin(analysis: Analysis) -> list[str]:
    """Return what a schedule says of itself."""
    settings = {key: value for key, value in analysis.origin["analyze"].items() if key not in INCIDENTAL}
    settings |= {f"selection.{key}": value for key, value in settings.pop("selection").items()}
    return [
        f"The cells of the least cost-adjusted gradient error of run {analysis.run} ({analysis.method}, "
        f"{analysis.image_size} pixels in patches of {analysis.patch_size}),",
        f"measured {analysis.origin['date']} on {analysis.samples} samples in sub-batches of {analysis.sub_batch}.",
        f"coldpress train {' '.join(analysis.origin['train'])}",
        f"coldpress analyze {' '.join(f'{key}={value}'.replace(' ', '') for key, value in settings.items())}",
    ]


def table(analysis: Analysis, choices: list[Choice]) -> str:
    """Return one line for each panel: the true gradient, the least error beside no compression's, and what was chosen.

    Errors are shares of the squared norm of the gradient.
    """
    lines = [
        "progress  checkpoint     |gradient|  uncompressed  least CA-MSE  at patch, dropout  ties  chosen     cost"
    ]
    for choice in choices:
        panel, best, chosen = choice.panel, choice.best, choice.chosen
        whole = [c for c in panel.cells if c.patch_size == analysis.patch_size and not c.dropout]
        share = f"{panel.ca_mse(whole[0]) / panel.magnitude:12.4f}" if whole else " " * 12
        lines.append(
            f"{panel.progress:8.1%}  {panel.checkpoint:13}  {max(panel.squared_gradient, 0) ** 0.5:10.4g}  {share}  "
            f"{panel.ca_mse(best) / panel.magnitude:12.4f}  {best.patch_size:10d}, {best.dropout:4.2f}  "
            f"{len(choice.ties):5d}  {chosen.patch_size:3d}, {chosen.dropout:4.2f}  {chosen.cost:6.3f}"
        )
    return "\n".join(lines)
