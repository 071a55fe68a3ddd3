"""Steps under DeepSpeed against plain torch, layers that really stay frozen, steps that must change nothing."""

from collections.abc import Callable

import pytest
import torch

from pipeline import distributed
from pipeline.engine import Engine, EngineConfig, Precision
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
    return {
        n: t for n, t in state.items() if not n.endswith(("qkv.bias", "encoder.norm.bias", "projector.1.running_mean"))
    }


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


@pytest.mark.parametrize("precision", list(Precision))
def test_a_step_that_is_not_finite_changes_nothing(
    make_moco: Callable[..., MoCo], make_batch: Callable[..., object], precision: Precision
) -> None:
    engine = engine_for(make_moco(), precision)
    engine.step(make_batch(), plan(0))
    batch = make_batch(start=8)
    batch.views[0][0, 0, 0, 0] = float("nan")  # type: ignore[attr-defined]
    weights = {n: p.detach().clone() for n, p in engine.method.named_parameters()}
    target = [a.clone() for a in engine.method._target[0]._average]  # type: ignore[attr-defined]
    assert not engine.step(batch, plan(1)).applied
    assert all(torch.equal(p, weights[n]) for n, p in engine.method.named_parameters())
    after = engine.method._target[0]._average  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) for a, b in zip(after, target, strict=True))


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
