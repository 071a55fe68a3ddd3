"""What a step says to other processes, by its shapes: gradients, weights that are cut, and what its method exchanges.

Left out: norms of gradients, a number for each group of parameters, and padding of shards that do not divide evenly.
Weights are counted from a method that has all of its own, as before an engine cuts them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from math import ceil

from torch import nn

from pipeline.engine_config import FSDP2, SHARDED, EngineConfig, Precision, deepspeed_options
from pipeline.methods.base import Method
from pipeline.schedules import StepPlan

FP32, BF16 = 4, 2


class Kind(Enum):
    """What becomes of what the processes bring."""

    # All get the sum, ...
    all_reduce = "all_reduce"
    # ... or each a part of it.
    reduce_scatter = "reduce_scatter"
    # All get what all have.
    all_gather = "all_gather"


class What(Enum):
    """What is sent."""

    gradients = "gradients"
    # As the step left them, or as a forward or backward needs them.
    weights = "weights"
    # Keys, outputs, batch statistics, and their gradients.
    batch = "batch"


@dataclass(frozen=True)
class Collective:
    """Some calls of one kind, and the bytes of the whole: of the sum, or of what all get."""

    what: What
    kind: Kind
    num_bytes: int
    calls: int = 1

    def sent(self, processes: int) -> float:
        """Return the bytes that each process sends in a ring of all, than which less is not possible."""
        turns = 2 if self.kind is Kind.all_reduce else 1
        return turns * self.num_bytes * (processes - 1) / processes


def step_traffic(
    method: Method, plan: StepPlan, engine: EngineConfig, processes: int, samples: int
) -> list[Collective]:
    """Return what a step sends in which each process has so many samples; nothing where there is one alone."""
    if processes == 1:
        return []
    return [*_of_weights(method, plan, engine), *_of_batch(method, processes, samples)]


def total(traffic: Sequence[Collective], *whats: What) -> int:
    """Return the bytes of some of it, or of all."""
    return sum(each.num_bytes for each in traffic if not whats or each.what in whats)


def _of_weights(method: Method, plan: StepPlan, engine: EngineConfig) -> Iterator[Collective]:
    learning = _learning(method, plan)
    if isinstance(engine, FSDP2):
        yield Collective(What.gradients, Kind.reduce_scatter, FP32 * learning, method.encoder.num_layers)
        yield _gathered_by_fsdp2(method, plan, engine)
        return
    zero = deepspeed_options(engine, 1, 0.0)["zero_optimization"]
    # Whole buckets up to stage 2, in fp32 whatever the weights are.
    kind = Kind.reduce_scatter if engine.stage == SHARDED else Kind.all_reduce
    yield Collective(What.gradients, kind, FP32 * learning, ceil(learning / zero["reduce_bucket_size"]))
    if engine.stage == SHARDED:
        numbers = _gathered_by_zero3(method, plan, zero["stage3_max_live_parameters"])
        calls = ceil(numbers / zero["stage3_prefetch_bucket_size"])
        yield Collective(What.weights, Kind.all_gather, _width(engine) * numbers, calls)
    elif engine.stage:
        # A call for each group of parameters.
        yield Collective(What.weights, Kind.all_gather, _width(engine) * learning, method.encoder.num_layers + 1)


def _gathered_by_zero3(method: Method, plan: StepPlan, live: int) -> int:
    """Count all weights once, and anew for each pass forward or backward what may not stay: DeepSpeed decides about it.

    Those of momentum encoders are gathered once.
    """
    everything, blocks, resting = _count(method), _count(method.encoder.blocks), _resting(method, plan)
    further = sum(each.learns for each in set(method.forwards(plan))) - 1
    again = max(0, everything - resting - live)
    again += further * (max(0, blocks - live) + max(0, blocks - resting - live))
    return everything + again + sum(_count(each.network) for each in method.momentum_encoders())


def _gathered_by_fsdp2(method: Method, plan: StepPlan, engine: EngineConfig) -> Collective:
    """Count blocks for each pass forward, those that learn for the pass backward as well, and all else once."""
    blocks = [_count(block) for block in method.encoder.blocks]
    # Equal passes go through a backbone together.
    passes = set(method.forwards(plan))
    learner = sum(each.learns for each in passes)
    resting = max(0, plan.frozen_layers - 1)
    numbers = learner * (sum(blocks) + sum(blocks[resting:])) + _count(method) - sum(blocks)
    calls = learner * (2 * len(blocks) - resting) + 1
    for follower in method.momentum_encoders():
        numbers += (len(passes) - learner - 1) * sum(blocks) + _count(follower.network)
        calls += (len(passes) - learner) * len(blocks) + 1
    return Collective(What.weights, Kind.all_gather, _width(engine) * numbers, calls)


def _of_batch(method: Method, processes: int, samples: int) -> Iterator[Collective]:
    for message in method.messages(samples):
        whole = FP32 * message.numbers * (processes if message.gathered else 1)
        yield Collective(What.batch, Kind.all_gather if message.gathered else Kind.all_reduce, whole)
        if message.learns:
            yield Collective(What.batch, Kind.all_reduce, whole)


def _learning(method: Method, plan: StepPlan) -> int:
    """Return how many numbers have a gradient."""
    gone = _gone(method, plan)
    return sum(p.numel() for p in method.parameters() if p.requires_grad and id(p) not in gone)


def _resting(method: Method, plan: StepPlan) -> int:
    """Return how many numbers are in layers that are frozen."""
    gone = _gone(method, plan)
    return sum(p.numel() for p in method.parameters() if id(p) in gone)


def _gone(method: Method, plan: StepPlan) -> set[int]:
    layers, attached = method.layers(), method.attached()
    return {id(p) for i in range(plan.frozen_layers) for p in (*layers[i], *attached.get(i, ()))}


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _width(engine: EngineConfig) -> int:
    return BF16 if engine.precision is Precision.bf16 else FP32
