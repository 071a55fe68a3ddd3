"""What several pipeline tests need: small networks, drawn shards, 2-process runs."""

import math
import os
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from data.manifest import Manifest, SampleIndex
from pipeline.analysis.results import Analysis, CellError, Panel
from pipeline.compression import Compression
from pipeline.methods import Method
from pipeline.methods.moco import MoCo, MoCoConfig
from pipeline.models.vit import ViT, ViTConfig
from pipeline.schedules import StepPlan

REPOSITORY = Path(__file__).parents[2]
RANK_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class FakeBatch:
    """A batch that no loader had to make."""

    views: tuple[torch.Tensor, ...]
    index: torch.Tensor
    labels: torch.Tensor | None = None


@pytest.fixture(autouse=True)
def own_rank_variables() -> Iterator[None]:
    """Keep what `distributed.start` sets from the commands that other tests start."""
    before = {name: os.environ.get(name) for name in RANK_NAMES}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture
def make_batch() -> Callable[..., FakeBatch]:
    def make(size: int = 8, start: int = 0, dtype: torch.dtype = torch.float32) -> FakeBatch:
        generator = torch.Generator().manual_seed(start)
        views = tuple(torch.randn(size, 3, 32, 32, generator=generator, dtype=dtype) for _ in range(2))
        return FakeBatch(views, torch.arange(start, start + size))

    return make


@pytest.fixture
def make_moco() -> Callable[..., MoCo]:
    def make(**changes: object) -> MoCo:
        torch.manual_seed(0)
        config = ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 3, 3, reference_length=17)
        return MoCo(MoCoConfig(**({"hidden_dim": 64, "out_dim": 32} | changes)), ViT(config, seed=0))  # type: ignore[arg-type]

    return make


@pytest.fixture
def make_plan() -> Callable[..., StepPlan]:
    """Return a plan in the middle of a run; the key follows the method's rule unless it is given."""

    def make(method: Method, query: Compression | None = None, frozen: int = 0, **changes: object) -> StepPlan:
        query = query or Compression()
        rates = (0.0,) * frozen + (1e-3,) * (method.encoder.num_layers - frozen)
        plan = StepPlan(0.5, 1e-3, 0.1, 0.99, rates, query, method.key_compression(query), 1e-3, 0.07)
        return replace(plan, **changes)  # type: ignore[arg-type]

    return make


def clean_environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in RANK_NAMES and not k.startswith("SLURM_")}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., list[str]]:
    """Run a Python snippet on several gloo processes and return what each printed."""

    def run(code: str, ranks: int, timeout: float = 240) -> list[str]:
        script = tmp_path / f"script_{ranks}.py"
        script.write_text(textwrap.dedent(code))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        processes = []
        for rank in range(ranks):
            values = (rank, rank, ranks, "127.0.0.1", port)
            env = clean_environment() | dict(zip(RANK_NAMES, map(str, values), strict=True))
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(script)],
                    env=env,
                    cwd=REPOSITORY,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )
        outputs = [p.communicate(timeout=timeout) for p in processes]
        for process, (out, err) in zip(processes, outputs, strict=True):
            assert process.returncode == 0, f"{out}\n{err}"
        return [out for out, _ in outputs]

    return run


@pytest.fixture
def damaged_shards(drawn_shards: Path, tmp_path: Path) -> Path:
    """Return a copy of the set in which samples 3 and 4 are no longer JPEGs."""
    copy = Path(shutil.copytree(drawn_shards, tmp_path / "damaged"))
    index = SampleIndex.load(copy, Manifest.load(copy))
    with index.paths[0].open("r+b") as tar:
        for sample in (3, 4):
            tar.seek(int(index.offset[sample]))
            tar.write(b"<html>")
    return copy


@pytest.fixture(scope="session")
def make_papers() -> Callable[..., Analysis]:
    """Return an analysis in the spirit of Figure 4 of Lin et al., 2024, by patch sizes, dropouts and progress.

    Compression costs bias, most of all late, and saves variance; eight sub-batches.
    """
    around = [1 + 0.02 * math.sin(j) for j in range(8)]

    def cell(progress: float, gradient: float, size: int, dropout: float) -> CellError:
        tokens = (240 // size) ** 2
        query = int(tokens * (1 - dropout) + 1e-9) + 1
        cost = (3 * query + tokens + 1) / 197
        missing = 1 - query / 226
        # At the start the mildest compression is estimated below zero.
        bias = gradient * ((0.05 + 0.6 * progress) * missing**3 - 2e-3 * (missing > 0))
        variance = 300 * gradient * (1 + 0.5 * missing)
        without = [bias * a for a in around], [variance * a for a in around[::-1]]
        plugin = bias + 0.01 * missing * gradient
        return CellError(size, dropout, query, tokens + 1, cost, cost, bias, plugin, variance, *without)

    def panel(progress: float, sizes: Sequence[int], dropouts: Sequence[float]) -> Panel:
        gradient = 4 * math.exp(-3 * progress)
        cells = [cell(progress, gradient, size, dropout) for size in sizes for dropout in dropouts]
        squares = [gradient * a for a in around]
        return Panel(progress, progress, "step", 0, 86_000_000, 4698.0, gradient, gradient, squares, cells)

    def make(sizes: Sequence[int], dropouts: Sequence[float], points: Sequence[float]) -> Analysis:
        panels = [panel(progress, sizes, dropouts) for progress in points]
        return Analysis("first", "moco", 240, 16, 256, 32, {}, panels)

    return make
