"""Steps under DeepSpeed against plain torch, layers that really stay frozen, steps that must change nothing."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline import distributed
from pipeline.engine import Engine
from pipeline.engine_config import EngineConfig, Precision
from pipeline.methods.moco import MoCo
from pipeline.optim import HEADS, OptimConfig, adamw, parameter_groups
from pipeline.schedules import StepPlan


@pytest.fixture(autouse=True)
def process_group() -> None:
    distributed.start()


def plan(step: int, frozen: int = 0) -> StepPlan:
    rates = tuple(0.0 if i < frozen else 1e-3 * (i + 1) for i in range(4))
    return StepPlan(step / 20, 2e-3, 0.1, 0.9, rates)


def engine_for(method: MoCo, precision: Precision = Precision.fp32, clip: float = 0.0) -> Engine:
    return Engine(method, EngineConfig(precision), OptimConfig(clip=clip), local_batch=8, device=torch.device("cpu"))


def comparable(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Leave out what has no gradient but rounding noise, whose sign Adam turns into whole steps.

    Softmax ignores the bias of keys, batch norm the shift of the features that enter the projector.
    """
    # Nor what a momentum encoder notes of layers that the engine froze.
    return {n: t for n, t in state.items() if not n.endswith(("qkv.bias", "encoder.norm.bias", "gaps"))}


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_steps_are_plain_torchs(make_moco: Callable[..., MoCo], make_batch: Callable[..., object], clip: float) -> None:
    engine, plain = engine_for(make_moco(), clip=clip), make_moco()
    optimizer = adamw(parameter_groups(plain.layers(), plain.parameters()), OptimConfig(clip=clip))
    for step in range(12):
        now = plan(step, frozen=2 if step >= 6 else 0)
        result = engine.step(make_batch(start=step * 8), now)
        output = plain(make_batch(start=step * 8), now)
        optimizer.zero_grad()
        output.loss.backward()
        live = [p for p in plain.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(live, clip or float("inf"))
        for group in optimizer.param_groups:
            group["lr"] = now.learning_rate if group["name"] == HEADS else now.layer_rates[int(group["name"][5:])]
        optimizer.step()
        plain.after_step(now, output)
        assert float(result.loss) == pytest.approx(float(output.loss.detach()), abs=1e-5)
        assert engine.grad_norm() == pytest.approx(float(norm), rel=1e-4)
    for name, want in comparable(plain.state_dict()).items():
        torch.testing.assert_close(
            engine.method.state_dict()[name], want, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, want in comparable(plain.state()).items():
        torch.testing.assert_close(
            engine.method.state()[name], want, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("precision", list(Precision))
def test_a_frozen_layer_does_not_change_by_a_bit(
    make_moco: Callable[..., MoCo], make_batch: Callable[..., object], precision: Precision
) -> None:
    moco = make_moco()
    engine = engine_for(moco, precision)
    for step in range(4):
        engine.step(make_batch(start=step * 8), plan(step))
    frozen = [p for layer in moco.layers()[:2] for p in layer]
    before = [p.detach().clone() for p in frozen]
    live = [p.detach().clone() for p in moco.layers()[2]]
    for step in range(4, 10):
        engine.step(make_batch(start=step * 8), plan(step, frozen=2))
        assert all(p.grad is None for p in frozen)
    assert all(torch.equal(p, b) for p, b in zip(frozen, before, strict=True))
    assert not any(torch.equal(p, b) for p, b in zip(moco.layers()[2], live, strict=True))


# Two engines take the same steps; to one of them a bad step happens in between, on one process only. Afterwards
# they must not differ by a bit: not in weights, optimizer and momentum encoder, nor in what the next step
# makes of them.
BAD_STEPS = """
    import os
    import sys
    from dataclasses import dataclass, replace
    import torch
    import torch.distributed as dist
    from pipeline import distributed, optimizer_state
    from pipeline.engine_config import FSDP2, EngineConfig, Offload, Precision
    from pipeline.engines import build_engine
    from pipeline.methods.moco import MoCo, MoCoConfig
    from pipeline.models.vit import ViT, ViTConfig
    from pipeline.optim import OptimConfig
    from pipeline.schedules import StepPlan
    from pipeline.shards import local

    world = distributed.start()

    @dataclass(frozen=True)
    class Batch:
        views: tuple
        index: torch.Tensor

    class Ill(MoCo):
        illness = ""

        def forward(self, batch, plan):
            ill = self.illness if world.rank == world.size - 1 else ""
            if ill == "image":
                batch.views[0][0, 0, 0, 0] = torch.nan
            output = super().forward(batch, plan)
            if ill == "loss":  # whose gradient is finite
                output = replace(output, loss=output.loss + torch.inf)
            if ill == "huge":  # finite, but no norm in fp32
                output = replace(output, loss=output.loss * 1e30)
            if ill == "gradient":  # whose loss is finite
                weight = self.projector[0].weight
                spoil = lambda g: (hook.remove(), g.index_fill(0, torch.tensor(5), torch.inf))[1]
                hook = weight.register_hook(spoil)
            return output

    def start():
        torch.manual_seed(0)
        vit = ViT(ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 3, 3, reference_length=17), seed=0)
        kind = FSDP2 if {stage!r} == "fsdp2" else EngineConfig
        stage = 3 if kind is FSDP2 else {stage!r}
        config = kind(Precision("{precision}"), stage, Offload("{offload}"), layer_norms={layer_norms})
        return build_engine(
            Ill(MoCoConfig(hidden_dim=64, out_dim=32), vit), config, OptimConfig(clip_each={clip_each}, clip={clip}),
            local_batch=8, device=world.device,
        )

    def step(engine, number, illness=""):
        generator = torch.Generator().manual_seed(2 * number + world.rank)
        views = tuple(torch.randn(8, 3, 32, 32, generator=generator) for _ in range(2))
        engine.method.illness = illness
        return engine.step(Batch(views, torch.arange(8)), StepPlan(0.1, 2e-3, 0.1, 0.9, (1e-3,) * 4)).applied

    def everything(value, at=""):
        if isinstance(value, torch.Tensor):
            yield at, value.detach().clone()
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from everything(item, f"{{at}}/{{key}}")
        elif isinstance(value, (list, tuple)):
            for number, item in enumerate(value):
                yield from everything(item, f"{{at}}/{{number}}")

    def state(engine):
        method = engine.method
        weights = {{name: local(each) for name, each in [*method.named_parameters(), *method.named_buffers()]}}
        optimizer = optimizer_state.inner_optimizer(engine._optimizer) if {stage!r} == "fsdp2" else engine._optimizer
        return dict(everything([weights, method.state(), optimizer.state_dict()]))

    def assert_same(one, two):
        assert one.keys() == two.keys()
        assert not [name for name in one if not torch.equal(one[name], two[name])]

    well, ill = start(), start()
    for number, illness in enumerate(["loss", "gradient", "image", "huge"]):
        assert step(well, number) and step(ill, number)
        before = state(ill)
        assert any("exp_avg" in n for n in before)
        assert not step(ill, 100 + number, illness)
        assert_same(before, state(ill))
    assert step(well, 50) and step(ill, 50)
    assert_same(state(well), state(ill))
    dist.barrier()
    print("same")
    sys.stdout.flush()
    # ZeRO 3 over gloo aborts now and then when the interpreter ends.
    os._exit(0)
    """


@pytest.mark.parametrize(
    ("precision", "stage", "ranks", "clip", "clip_each", "layer_norms", "offload"),
    [
        ("fp32", 1, 1, 0.0, 3.0, True, "none"),
        ("fp32", 1, 2, 1.0, 0.0, False, "none"),
        ("fp32", 1, 2, 0.0, 3.0, False, "none"),
        ("bf16", 1, 2, 1.0, 0.0, True, "none"),
        ("bf16", 1, 2, 0.0, 3.0, False, "none"),
        ("fp32", 0, 2, 1.0, 0.0, False, "none"),
        ("fp32", 0, 1, 0.0, 3.0, True, "none"),
        ("bf16", 0, 2, 1.0, 0.0, False, "none"),
        ("fp32", 2, 2, 1.0, 0.0, False, "none"),
        ("bf16", 2, 1, 0.0, 3.0, False, "none"),
        ("bf16", 2, 2, 1.0, 0.0, True, "optimizer"),
        ("fp32", 3, 1, 0.0, 3.0, False, "parameters"),
        ("bf16", "fsdp2", 2, 0.0, 3.0, True, "none"),
    ],
)
def test_a_step_that_is_not_finite_on_one_process_changes_nothing_on_any(
    run_ranks: Callable[..., list[str]],
    precision: str,
    stage: int | str,
    ranks: int,
    clip: float,
    clip_each: float,
    layer_norms: bool,
    offload: str,
) -> None:
    told = {"precision": precision, "stage": stage, "clip": clip, "clip_each": clip_each, "layer_norms": layer_norms}
    script = BAD_STEPS.format(**told, offload=offload)
    assert [said.strip().splitlines()[-1] for said in run_ranks(script, ranks)] == ["same"] * ranks


def test_momentum_encoder_keeps_fp32_under_bf16(
    make_moco: Callable[..., MoCo], make_batch: Callable[..., object]
) -> None:
    moco = make_moco()
    engine = engine_for(moco, Precision.bf16)
    target = moco._target[0]
    want = [a.clone() for a in target._average]
    for step in range(3):
        now = StepPlan(0.5, 2e-3, 0.1, 0.999, (1e-3,) * 4)
        assert engine.step(make_batch(start=8 * step), now).applied
        online = [p.detach().float() for p in (*moco.encoder.parameters(), *moco.projector.parameters())]
        want = [w.lerp(p, 1 - 0.999) for w, p in zip(want, online, strict=True)]
    for average, expected in zip(target._average, want, strict=True):
        assert average.dtype == torch.float32
        torch.testing.assert_close(average, expected, atol=1e-7, rtol=0)
    assert {p.dtype for p in target.network.parameters()} == {torch.bfloat16}


def test_a_resumed_run_clips_as_it_is_told_now(
    make_moco: Callable[..., MoCo], make_batch: Callable[..., object], tmp_path: Path
) -> None:
    engine_for(make_moco(), clip=0.5).save(tmp_path / "saved")
    resumed, clipped = engine_for(make_moco()), []
    resumed.load(tmp_path / "saved")
    for engine in (resumed, engine_for(make_moco()), engine_for(make_moco(), clip=0.5)):
        engine.step(make_batch(), plan(1))
        engine.step(make_batch(start=8), plan(2))
        clipped.append(engine.method.projector[0].weight.detach().clone())  # type: ignore[attr-defined]
    assert torch.equal(clipped[0], clipped[1])
    assert not torch.equal(clipped[0], clipped[2])


def test_at_least_one_step_may_be_skipped() -> None:
    with pytest.raises(ValueError, match=r"engine\.max_skipped must be at least 1 step, got 0; 10 is usual"):
        EngineConfig(max_skipped=0)


def test_deepspeed_compiles_nothing_and_says_nothing_when_it_is_imported() -> None:
    command = [sys.executable, "-c", "import pipeline.engine"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "gcc" not in done.stderr
