"""What a run shows to its probe, and what becomes of the answer."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from pipeline import distributed
from pipeline.checkpoint import TrainState
from pipeline.compose import load
from pipeline.distributed import World
from pipeline.models.vit import ViT
from pipeline.parts import build
from pipeline.run_directory import RunDirectory
from pipeline.train import train


class Watcher:
    """A probe that is always due and only takes note."""

    def __init__(self) -> None:
        self.seen: list[ViT] = []

    def due(self, elapsed: float, seconds_per_sample: float) -> bool:
        return True

    def run(self, encoder: ViT, world: World, elapsed: float) -> float:
        self.seen.append(encoder)
        return 0.25 * len(self.seen)


def test_the_network_that_is_evaluated_is_probed(tmp_path: Path, drawn_shards: Path) -> None:
    small = ["batch_size=8", "budget.value=2", "budget.unit=steps", "model.depth=1", "data.threads=1"]
    words = ["experiment=small_dino", "run=r", f"runs={tmp_path}", f"data.shards={drawn_shards}", *small]
    config = load("train", [*words, "monitor.prometheus=false"])
    world, papers, probe = distributed.start(), RunDirectory(config), Watcher()
    parts = replace(build(config, world), probe=probe)
    papers.open(words)
    never = SimpleNamespace(requested=False, exit_code=75, after=str)
    try:
        assert train(config, world, never, parts, TrainState(), papers) == 0  # type: ignore[arg-type]
    finally:
        parts.loader.close()
    # Of DINO: the teacher.
    assert parts.method.representation is not parts.method.encoder
    assert [each is parts.method.representation for each in probe.seen] == [True, True]
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [row["knn_top1_ratio"] for row in rows if "knn_top1_ratio" in row] == [0.25, 0.5]
