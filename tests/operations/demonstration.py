"""A run's life on a cluster, with the real programs: preempted, hit by the loss of a node, and finished.

Two nodes of Slurm and a Prometheus that watches run on this machine; the batch scripts, rules and commands are those
that users have. `make demo-cluster` prints what became of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from operations.account import Account
from operations.job_history import JobHistory
from operations.retelling import picture, text
from operations.servers import Server, lay_out, prometheus
from slurm.cluster import SlurmCluster, missing_programs

from data.drawn import draw_image_folder
from pipeline.children import own_directory

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
RUN = "first"
STEPS = 300
MARKER = ".coldpress-demo"
# What a machine without GPU gives to a task.
TASK = ("--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=0")
# Photographs of any size, some of them broken perhaps, seen at 48 pixels.
OWN_IMAGES = ("shorter_side=96", "max_rejected=1000000")


@dataclass(frozen=True)
class Stage:
    """Where it takes place."""

    root: Path
    cluster: SlurmCluster
    server: Server

    @property
    def runs(self) -> Path:
        """Return where the runs are that Prometheus watches."""
        return self.root / "runs"

    @property
    def shards(self) -> Path:
        """Return the training shards."""
        return self.root / "shards"

    def submit(self, script: str, *words: str, options: tuple[str, ...] = ()) -> str:
        """Submit one of the shipped scripts as a user would; return the number of the job."""
        output = f"--output={self.root}/{Path(script).stem}.log"
        return self.cluster.sbatch(output, *options, f"slurm/{script}", *words, cwd=ROOT, COLDPRESS_BIN=str(BIN))


@contextmanager
def opened(root: Path, program: str, clock: str = "1s") -> Iterator[Stage]:
    """Start two nodes, and this Prometheus, which watches what is below an empty directory."""
    config = lay_out(root, clock)
    _hurry(config.with_name("rules.yml"))
    with prometheus(program, config, root) as server, SlurmCluster(nodes=2) as cluster:
        yield Stage(root, cluster, server)


def play(stage: Stage, images: Path | None = None, steps: int = STEPS, words: Sequence[str] = ()) -> Account:
    """Shard, train, preempt, take a node away, and wait for the end; return what happened."""
    shard(stage, images)
    job = train(stage, steps, words)
    with JobHistory(stage.cluster, job) as history:
        wait_for(stage, job, lambda: steps_done(stage) >= steps // 3)
        preempt(stage, history)
        wait_for(stage, job, lambda: lives(stage) == 2 and steps_done(stage) >= 2 * steps // 3)
        if len(stage.cluster.nodes) > 1:
            lose_a_node(stage, history)
        stage.cluster.wait(job, "COMPLETED", "FAILED", timeout=600)
    return Account.of(stage.runs / RUN, stage.cluster.job(job), history, stage.server)


def shard(stage: Stage, images: Path | None) -> None:
    """Pack the given images, or drawn ones, by a job."""
    if images is None:
        images = stage.root / "images"
        draw_image_folder(images)
    nodes = f"--nodes={len(stage.cluster.nodes)}"
    words = (f"source={images}", f"output={stage.shards}", *OWN_IMAGES)
    job = stage.submit("shard.sbatch", *words, options=(nodes, "--cpus-per-task=1"))
    ended = stage.cluster.wait(job, timeout=600)
    assert ended["JobState"] == "COMPLETED", (stage.root / "shard.log").read_text()


def train(stage: Stage, steps: int, words: Sequence[str]) -> str:
    """Submit a run of two tasks that others may preempt."""
    nodes = len(stage.cluster.nodes)
    options = (*TASK, f"--nodes={nodes}", f"--ntasks-per-node={2 // nodes}", "--partition=preemptible")
    return stage.submit(
        "train.sbatch",
        "experiment=demo",
        f"run={RUN}",
        f"runs={stage.runs}",
        f"data.shards={stage.shards}",
        f"budget.value={steps}",
        f"checkpoint.every_steps={max(1, steps // 15)}",
        "log_every=1",
        *words,
        options=options,
    )


def preempt(stage: Stage, history: JobHistory) -> None:
    """Submit a job of a partition that goes first, and that wants all nodes."""
    nodes = f"--nodes={len(stage.cluster.nodes)}"
    wanted = ("--partition=main", nodes, "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    history.note("somebody submits a job of a higher priority", steps_done(stage))
    stage.cluster.sbatch(*wanted, cwd=ROOT)


def lose_a_node(stage: Stage, history: JobHistory) -> None:
    """Take the second node's power away, and start it again once Slurm has noticed."""
    name = stage.cluster.nodes[1].name
    stage.cluster.crash(name)
    history.note(f"node {name} loses its power", steps_done(stage))
    stage.cluster.wait(history.job, "PENDING", timeout=120)
    stage.cluster.boot(name)
    history.note(f"node {name} is back")


def wait_for(stage: Stage, job: str, condition: Callable[[], bool], timeout: float = 300) -> None:
    """Wait; a job that ends meanwhile, or takes too long, shows its log."""
    end = time.monotonic() + timeout
    while not condition():
        state = stage.cluster.job(job)["JobState"]
        assert state not in ("FAILED", "CANCELLED", "COMPLETED"), (state, (stage.root / "train.log").read_text())
        assert time.monotonic() < end, (state, (stage.root / "train.log").read_text())
        time.sleep(0.1)


def steps_done(stage: Stage) -> int:
    """Return the last reported step, 0 before the first."""
    path = stage.runs / RUN / "metrics.jsonl"
    # A line may be half written.
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def lives(stage: Stage) -> int:
    """Return how often the run has begun to train."""
    log = stage.runs / RUN / "train.log"
    said = log.read_text() if log.exists() else ""
    return said.count(" starting at step ") + said.count(" resumed at step ")


def _hurry(rules: Path) -> None:
    """Let alerts wait for seconds where they wait for minutes; a target that is gone is known after five."""
    lines = rules.read_text().splitlines()
    rules.write_text("\n".join("        for: 6s" if line.startswith("        for: ") else line for line in lines))


def main() -> None:
    """Play it and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--at", type=Path, required=True, help="where its things are kept; emptied first")
    parser.add_argument("--images", type=Path, help="class folders or a tar of them; drawn ones without")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    wanted = {"prometheus": shutil.which("prometheus")} | dict.fromkeys(missing_programs())
    if lacking := [name for name, path in wanted.items() if path is None]:
        sys.exit(f"not installed: {', '.join(lacking)}; apt-get install munge slurmctld slurmd slurm-client prometheus")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    root = own_directory(arguments.at.resolve(), MARKER)
    with opened(root, str(wanted["prometheus"])) as stage:
        account = play(stage, arguments.images, arguments.steps)
    print(text(account))
    picture(account, root / "cluster.png")
    print(f"picture: {root / 'cluster.png'}\nlog: {root / 'train.log'}")


if __name__ == "__main__":
    main()
