"""Command: the whole pipeline in minutes, as a user would type it: shard, train, get stopped, resume, evaluate."""

from __future__ import annotations

import logging
import signal
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from data.drawn import draw_image_folder
from data.manifest import Manifest
from pipeline.children import best_knn, coldpress, metrics_of, own_directory, running
from pipeline.plots import training_picture
from pipeline.preemption import EXIT_STOPPED

RUN = "mocov3"
MARKER = ".coldpress-demo"
# The step after which the demo plays the scheduler that wants its node back.
STOP_AFTER = 200
SAMPLES_PER_CLASS = 10
# Photographs of any size, some of them broken perhaps, seen at 48 pixels.
OWN_IMAGES = ("shorter_side=96", "max_rejected=1000000")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where the demo keeps its things."""

    root: Path

    @property
    def run(self) -> Path:
        """Return the run directory."""
        return self.root / RUN

    @property
    def metrics(self) -> Path:
        """Return the run's metrics file."""
        return self.run / "metrics.jsonl"


@dataclass
class DemoConfig:
    """The whole pipeline in minutes, on drawn images or on a folder or tar of one's own."""

    images: str = ""
    output: str = "runs/demo"


def run(config: DemoConfig) -> None:
    """Run every command once and print what it gave."""
    if config.images and not Path(config.images).exists():
        raise ValueError(f"images: nothing at {config.images}; give a folder or a tar of images.")
    place = Place(own_directory(Path(config.output), MARKER))
    train, queries = prepare(place, config.images)
    seconds = pretrain(place, train)
    knn = [evaluate(place, queries, c) for c in ("init", "latest")] if has_neighbors(train) else []
    pictures = draw(place, train)
    print(table(place, seconds, knn))
    for picture in pictures:
        print(f"picture: {picture}")


def has_neighbors(shards: Path) -> bool:
    """Return whether the set has labels, and enough samples of each for neighbors to mean something."""
    manifest = Manifest.load(shards)
    return 0 < SAMPLES_PER_CLASS * len(manifest.classes) <= manifest.samples


def prepare(place: Place, images: str) -> tuple[Path, Path | None]:
    """Shard the given images, or drawn ones; return training shards and, if there are any, validation shards."""
    train, val = place.root / "shards", place.root / "shards-val"
    if images:
        coldpress("shard", f"source={images}", f"output={train}", *OWN_IMAGES)
        return train, None
    for folder, per_class, seed, shards in (("images", 250, 0, train), ("images-val", 50, 1, val)):
        log.info("drawing %s", place.root / folder)
        draw_image_folder(place.root / folder, per_class=per_class, seed=seed)
        coldpress("shard", f"source={place.root / folder}", f"output={shards}")
    return train, val


def pretrain(place: Place, shards: Path) -> float:
    """Train, take the node away in the middle, train on; return the seconds that both lives took."""
    begin = time.monotonic()
    with running("train", *arguments(place, shards)) as process:
        while process.poll() is None and steps_done(place) < STOP_AFTER:
            time.sleep(0.2)
        log.info("--- stopping the run as Slurm would, with SIGTERM")
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    if code not in (0, EXIT_STOPPED):
        raise ValueError(f"demo: training failed; see {place.run / 'train.log'}.")
    log.info("--- and the same command again")
    coldpress("train", *arguments(place, shards))
    return time.monotonic() - begin


def arguments(place: Place, shards: Path) -> list[str]:
    """Return the demo's one training command."""
    return ["experiment=demo", f"run={RUN}", f"runs={place.root}", f"data.shards={shards}"]


def evaluate(place: Place, queries: Path | None, checkpoint: str) -> float:
    """Return the best k-NN accuracy of a checkpoint."""
    extra = [f"shards={queries}"] if queries else []
    coldpress("evaluate", f"run={RUN}", f"runs={place.root}", f"checkpoint={checkpoint}", *extra)
    return best_knn(place.run)


def draw(place: Place, shards: Path) -> list[Path]:
    """Draw the schedule and the training curves."""
    coldpress("plan", *arguments(place, shards))
    training = place.run / "plots" / "training.png"
    training_picture(place.metrics, training)
    return [place.root / f"{RUN}-plan.png", training]


def table(place: Place, seconds: float, knn: list[float]) -> str:
    """Return the closing table."""
    rows = [r for r in metrics_of(place.run) if "loss" in r]
    last = rows[-1]

    def median(name: str) -> float:
        return statistics.median(r[name] for r in rows)

    lines = [
        ("budget spent", f"{last['budget_spent']:,g} of {last['budget_total']:,g} steps"),
        ("wall-clock", f"{seconds:.0f} s in two lives"),
        ("images/s (median)", f"{median('samples_per_second'):,.0f}"),
        ("tokens/s (median)", f"{median('tokens_per_second'):,.0f}"),
        ("waiting for data (median)", f"{100 * median('data_wait_ratio'):.1f} %"),
        ("loss, first -> last", f"{rows[0]['loss']:.3f} -> {last['loss']:.3f}"),
        ("frozen layers at the end", f"{last['frozen_layers']:.0f}"),
    ]
    if knn:
        lines.append(("k-NN top-1, before -> after", f"{100 * knn[0]:.1f} % -> {100 * knn[1]:.1f} %"))
    return "\n".join(["", *(f"{name:<28} {value}" for name, value in lines), ""])


def steps_done(place: Place) -> int:
    """Return the last logged step."""
    rows = metrics_of(place.run)
    return int(rows[-1]["step"]) if rows else 0
