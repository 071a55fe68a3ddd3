"""How a step would scale over GPUs: a model, from counted FLOPs and bytes and a cluster that is stated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.engine_config import EngineConfig
from pipeline.flops import step_flops
from pipeline.methods.base import Method
from pipeline.schedules import StepPlan
from pipeline.traffic import Collective, What, step_traffic, total

TERA, GIGA, MEGA, MICRO = 1e12, 1e9, 1e6, 1e-6
# Of forward and backward, two thirds are backward, under which gradients can travel.
BACKWARD_SHARE = 2 / 3
WEAK, STRONG = "weak", "strong"


@dataclass
class ClusterConfig:
    """GPUs and what connects them."""

    # What a GPU reaches on this model: its peak times the utilization that a run reports (mfu_ratio).
    teraflops: float = 400.0
    gpus_per_node: int = 8
    # As NCCL's tests print it for large messages (busbw), on one node and over several.
    node_gigabytes_per_second: float = 300.0
    network_gigabytes_per_second: float = 100.0
    # What a collective takes however small it is, for each doubling of the GPUs.
    latency_microseconds: float = 10.0

    def __post_init__(self) -> None:
        if self.gpus_per_node < 1:
            raise ValueError(f"cluster.gpus_per_node must be at least 1, got {self.gpus_per_node}; 8 is usual.")
        for name in ("teraflops", "node_gigabytes_per_second", "network_gigabytes_per_second"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"cluster.{name} must be above 0, got {getattr(self, name):g}; leave it out for usual."
                )
        if not 0 <= self.latency_microseconds < math.inf:
            raise ValueError(
                f"cluster.latency_microseconds must be at least 0, got {self.latency_microseconds:g}; 10 is usual."
            )

    def seconds(self, collective: Collective, gpus: int) -> float:
        """Return how long some calls take: a ring that is as fast as its slowest part, and a tree of latencies."""
        bandwidth = self.node_gigabytes_per_second if gpus <= self.gpus_per_node else self.network_gigabytes_per_second
        latency = collective.calls * self.latency_microseconds * MICRO * math.ceil(math.log2(gpus))
        return collective.sent(gpus) / (bandwidth * GIGA) + latency

    def assumptions(self) -> str:
        """Say what the model stands on."""
        return "\n".join(
            (
                "a model, of which nothing is measured:",
                f"- {self.teraflops:g} TFLOPS reached on each GPU, whatever its batch (cluster.teraflops)",
                f"- nodes of {self.gpus_per_node} GPUs (cluster.gpus_per_node); bus bandwidth by NCCL's tests: "
                f"{self.node_gigabytes_per_second:g} GB/s in a node (cluster.node_gigabytes_per_second) and "
                f"{self.network_gigabytes_per_second:g} GB/s beyond (cluster.network_gigabytes_per_second)",
                f"- rings; {self.latency_microseconds:g} us for each collective and doubling of the GPUs "
                "(cluster.latency_microseconds)",
                "- weak: each GPU keeps the batch that it has at the fewest; strong: the whole batch stays",
                "- step: with nothing overlapped, and if all gradients could travel under the backward, which not "
                "every engine does; efficiency: compute over step, of both",
                "- left out: data, optimizer, momentum update, stragglers, and the inner products of the losses, of "
                "which a larger batch has more",
            )
        )


@dataclass(frozen=True)
class Scaled:
    """A step on so many GPUs: bytes are those of whole sums and gathers, seconds those of one GPU."""

    gpus: int
    scaling: str
    local_batch: int
    compute: float
    reduced_bytes: int
    gathered_bytes: int
    batch_bytes: int
    reduction: float
    communication: float

    @property
    def apart(self) -> float:
        """Return the seconds of a step that computes and communicates by turns."""
        return self.compute + self.communication

    @property
    def together(self) -> float:
        """Return the seconds of a step whose gradients travel while the backward goes on."""
        return self.apart - min(self.reduction, BACKWARD_SHARE * self.compute)


def scaled_steps(
    method: Method,
    plan: StepPlan,
    engine: EngineConfig,
    cluster: ClusterConfig,
    *,
    batch_size: int,
    ranks: Sequence[int],
) -> list[Scaled]:
    """Return the steps of a plan on several numbers of GPUs, where the batch grows with them and where it does not."""
    return [
        _scaled(method, plan, engine, cluster, gpus, scaling, local)
        for gpus, scaling, local in _batches(batch_size, sorted(set(ranks)))
    ]


def scaling_table(method: Method, plan: StepPlan, steps: Sequence[Scaled]) -> str:
    """Return the steps of one plan as text."""
    size = method.encoder.config.patch_size
    patches = plan.query.num_patches(method.encoder.config.image_size, size)
    dropout = 1 - plan.query.keep(patches) / patches
    lines = [
        f"scaling of a step with patch {plan.query.patch_size(size)}, dropout {dropout:.3f}, "
        f"{plan.frozen_layers} frozen layers:",
        "  GPUs  scaling    batch  per GPU  compute ms  gradients MB  weights MB  batch MB  communication ms"
        "       step ms     efficiency",
    ]
    return "\n".join([*lines, *map(_line, steps)])


def _batches(batch_size: int, ranks: Sequence[int]) -> Iterator[tuple[int, str, int]]:
    """Yield GPUs, scaling and batch of each; the fewest are where both begin."""
    first = batch_size // ranks[0]
    for gpus in ranks:
        if gpus > ranks[0]:
            yield gpus, WEAK, first
        # A batch that cannot be shared evenly is refused by a run.
        if batch_size % gpus == 0:
            yield gpus, STRONG if gpus > ranks[0] else "", batch_size // gpus


def _scaled(
    method: Method, plan: StepPlan, engine: EngineConfig, cluster: ClusterConfig, gpus: int, scaling: str, local: int
) -> Scaled:
    traffic = step_traffic(method, plan, engine, gpus, local)
    seconds = {what: sum(cluster.seconds(each, gpus) for each in traffic if each.what is what) for what in What}
    return Scaled(
        gpus=gpus,
        scaling=scaling,
        local_batch=local,
        compute=step_flops(method, plan, local) / (cluster.teraflops * TERA),
        reduced_bytes=total(traffic, What.gradients),
        gathered_bytes=total(traffic, What.weights),
        batch_bytes=total(traffic, What.batch),
        reduction=seconds[What.gradients],
        communication=sum(seconds.values()),
    )


def _line(step: Scaled) -> str:
    return (
        f"{step.gpus:6d}  {step.scaling:7s}{step.gpus * step.local_batch:9,d}{step.local_batch:9,d}"
        f"{1e3 * step.compute:12.1f}"
        f"{step.reduced_bytes / MEGA:14,.1f}{step.gathered_bytes / MEGA:12,.1f}{step.batch_bytes / MEGA:10,.1f}"
        f"{1e3 * step.communication:18.2f}"
        f"{1e3 * step.apart:8.1f}-{1e3 * step.together:<8.1f}"
        f"{step.compute / step.apart:6.1%}-{step.compute / step.together:.1%}"
    )
