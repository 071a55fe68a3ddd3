"""Pre-warming foresees every graph of a run, and a run that was pre-warmed is the same to the bit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from pipeline import distributed
from pipeline.compression import Compression, Stage, Staged
from pipeline.engine import Engine
from pipeline.engine_config import EngineConfig, Precision
from pipeline.freezing import FreezeOut
from pipeline.methods import DINOConfig, Method, MoCoConfig, SimCLRConfig, build_method
from pipeline.models.blocks import CompiledBlocks
from pipeline.models.vit import ViT, ViTConfig
from pipeline.optim import OptimConfig
from pipeline.prewarm import prewarm
from pipeline.schedules import RateConfig, Schedules, StepPlan

CPU = torch.device("cpu")
STEPS = 14
CONFIGS = {
    "moco": MoCoConfig(hidden_dim=64, out_dim=32),
    "simclr": SimCLRConfig(hidden_dim=64, out_dim=32),
    # Its prototypes wait for two of the steps.
    "dino": DINOConfig(
        out_dim=24, hidden_dim=40, bottleneck_dim=16, small_crops=2, small_size=16, last_layer_start=0.1
    ),
}


@dataclass(frozen=True)
class Crops:
    views: tuple[torch.Tensor, ...]
    index: torch.Tensor


@pytest.fixture(autouse=True)
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trace forward and backward as in a run, but generate no code: that takes ten seconds a shape on a CPU."""
    distributed.start()
    torch._dynamo.reset()
    monkeypatch.setattr("pipeline.models.vit.CompiledBlocks", lambda: CompiledBlocks("aot_eager"))
    yield
    torch._dynamo.reset()


def make_engine(name: str, precision: Precision, **changes: object) -> tuple[Engine, list[StepPlan]]:
    torch.manual_seed(0)
    config = replace(ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 3, 3, compile=True), **changes)  # type: ignore[arg-type]
    method = build_method(CONFIGS[name], ViT(config, seed=0))
    engine = Engine(method, EngineConfig(precision), OptimConfig(), local_batch=8, device=CPU)
    schedules = Schedules(
        rate=RateConfig(),
        peak_rate=1e-3,
        weight_decay=OptimConfig().weight_decay_at,
        compression=Staged([Stage(patch_size=16, dropout=0.5, until=0.3), Stage(dropout=0.25, until=0.7)]),
        freeze=FreezeOut(t0=0.4),
        num_layers=4,
        method=method,
    )
    return engine, [schedules.at(step / STEPS) for step in range(STEPS)]


def make_crops(method: Method, step: int) -> Crops:
    generator = torch.Generator().manual_seed(step)
    views = tuple(torch.randn(8, 3, view.size, view.size, generator=generator) for view in method.views())
    return Crops(views, torch.arange(8 * step, 8 * step + 8))


def trace(method: Method) -> dict[str, torch.Tensor]:
    state = {f"state {name}": tensor.clone() for name, tensor in method.state().items()}
    state |= {name: tensor.detach().clone() for name, tensor in (*method.named_parameters(), *method.named_buffers())}
    return state | {"random": torch.get_rng_state()}


@pytest.mark.parametrize(
    ("name", "precision"),
    [("moco", Precision.fp32), ("simclr", Precision.bf16), ("dino", Precision.bf16)],
)
def test_pre_warming_leaves_no_trace_but_every_graph(name: str, precision: Precision) -> None:
    engine, plans = make_engine(name, precision)
    method = engine.method
    before, learning = trace(method), [p.requires_grad for p in method.parameters()]
    prewarm(method, plans, 8, CPU)
    after = trace(method)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [p.requires_grad for p in method.parameters()] == learning
    assert all(p.grad is None for p in method.parameters())

    blocks = method.encoder.run_block
    assert isinstance(blocks, CompiledBlocks)
    graphs = blocks.graphs
    losses = [engine.step(make_crops(method, step), plan).loss for step, plan in enumerate(plans)]
    assert len({(plan.query, plan.frozen_layers) for plan in plans}) >= 5
    assert (blocks.graphs, blocks.recompiles) == (graphs, 0)

    cold, _ = make_engine(name, precision)
    for step, plan in enumerate(plans):
        assert torch.equal(cold.step(make_crops(method, step), plan).loss, losses[step])
    warm_end, cold_end = trace(method), trace(cold.method)
    assert all(torch.equal(warm_end[name], cold_end[name]) for name in warm_end)

    # What no plan told of is counted from then on.
    with torch.no_grad():
        method.encoder(torch.zeros(3, 3, 32, 32), Compression(), torch.arange(3))
    assert blocks.recompiles > 0


def test_nothing_is_run_if_nothing_is_compiled() -> None:
    engine, plans = make_engine("moco", Precision.fp32, compile=False)
    calls: list[object] = []
    engine.method.register_forward_pre_hook(lambda *_: calls.append(1))
    prewarm(engine.method, plans, 8, CPU)
    assert calls == []
