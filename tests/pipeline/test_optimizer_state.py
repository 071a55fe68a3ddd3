"""What an engine keeps of its optimizer when layers freeze, to the bit, and what it lets go of."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from pipeline import distributed
from pipeline.engine import Engine
from pipeline.engine_config import EngineConfig, Offload, Precision
from pipeline.methods.moco import MoCo
from pipeline.optim import OptimConfig
from pipeline.optimizer_state import masters
from pipeline.schedules import StepPlan

MakeMoCo = Callable[..., MoCo]
MakeBatch = Callable[..., object]
EVERY = [
    *((stage, Offload.none, precision) for stage in (0, 1, 2, 3) for precision in Precision),
    (1, Offload.optimizer, Precision.bf16),
    (2, Offload.optimizer, Precision.fp32),
    (3, Offload.optimizer, Precision.fp32),
    (3, Offload.parameters, Precision.bf16),
]


@pytest.fixture(autouse=True)
def process_group() -> None:
    distributed.start()


def trained(make_moco: MakeMoCo, make_batch: MakeBatch, stage: int, offload: Offload, precision: Precision) -> Engine:
    config = EngineConfig(precision, stage, offload)
    optim = OptimConfig(decay_vectors=False)
    engine = Engine(make_moco(), config, optim, local_batch=8, device=torch.device("cpu"))
    for step in range(3):
        engine.step(make_batch(start=step * 8), plan(0))  # type: ignore[arg-type]
    return engine


def plan(frozen: int) -> StepPlan:
    return StepPlan(0.5, 2e-3, 0.1, 0.9, (0.0,) * frozen + (1e-3,) * (4 - frozen))


def known(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield masters, moments and counts by the name of their group."""
    optimizer: Any = engine._engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    for (name, number), master in masters(optimizer):
        yield f"{name} {number} master", master.detach().clone()
        for key, value in inner.state[master].items():
            yield f"{name} {number} {key}", torch.as_tensor(value).clone()


def count_hooks(engine: Engine) -> int:
    """Count what is called before and after the forward of every module."""
    modules = list(engine._exposed.modules())
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in modules)


def size_of(parameter: torch.Tensor) -> int:
    """Return the number of a parameter's elements, gathered or not."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def tensor_bytes() -> int:
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        # Of what was compiled before in this process, there are tensors without memory.
        real = isinstance(each, torch.Tensor) and not isinstance(each, FakeTensor)
        if real and each.device.type == "cpu":
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize(("stage", "offload", "precision"), EVERY)
def test_what_still_learns_keeps_all_to_the_bit(
    make_moco: MakeMoCo, make_batch: MakeBatch, stage: int, offload: Offload, precision: Precision
) -> None:
    engine = trained(make_moco, make_batch, stage, offload, precision)
    before = dict(known(engine))
    assert {name.split()[-1] for name in before} == {"master", "step", "exp_avg", "exp_avg_sq"}
    engine.freeze(2)
    after = dict(known(engine))
    assert after.keys() == {name for name in before if not name.startswith(("layer00", "layer01"))}
    assert all(torch.equal(after[name], before[name]) for name in after)
    # A moment of zeros would be equal to one that was lost.
    assert all(after[name].any() for name in after if name.endswith("exp_avg"))


@pytest.mark.parametrize(("stage", "offload", "precision"), EVERY)
def test_what_is_frozen_is_let_go_of_and_nothing_piles_up(
    make_moco: MakeMoCo, make_batch: MakeBatch, stage: int, offload: Offload, precision: Precision
) -> None:
    engine = trained(make_moco, make_batch, stage, offload, precision)
    hooks = count_hooks(engine)
    live = [tensor_bytes()]
    kept = [engine.optimizer_bytes()]
    for frozen in (1, 2, 3):
        for step in range(2):
            engine.step(make_batch(start=step * 8), plan(frozen))  # type: ignore[arg-type]
        assert count_hooks(engine) == hooks
        live.append(tensor_bytes())
        kept.append(engine.optimizer_bytes())
    gone = sum(size_of(p) for layer in engine.method.layers()[:3] for p in layer)
    # MoCo's patch projection never learned.
    gone -= sum(size_of(p) for p in engine.method.encoder.patch.parameters())
    # Moments, and fp32 masters where the weights are not their own; a few bytes are counts and padding.
    per_weight = 8 if stage == 0 and precision is Precision.fp32 else 12
    shown = 12
    assert kept[0] - kept[-1] == pytest.approx(shown * gone, rel=0.01)
    # At stage 3 a batch of an earlier step or two is still about, and so few weights stay gathered between uses.
    batch = sum(view.numel() * view.element_size() for view in make_batch().views)  # type: ignore[attr-defined]
    slack = 2 * batch + 4 * gone if stage == 3 else 0
    assert live[0] - live[-1] > 0.95 * per_weight * gone - slack, (live, gone)
    if precision is Precision.bf16 and stage == 1:
        # And the fp32 gradients.
        assert live[0] - live[-1] > 0.95 * 16 * gone, (live, gone)
