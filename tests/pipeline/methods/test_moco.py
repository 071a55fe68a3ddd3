"""MoCo-v3 against an independent fp64 reference, and where gradients and momentum go."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from pipeline.compression import Compression
from pipeline.compression.schedule import compression
from pipeline.losses import info_nce
from pipeline.methods.moco import MoCo, MoCoConfig
from pipeline.schedules import StepPlan

MakePlan = Callable[..., StepPlan]


def reference_loss(q: torch.Tensor, k: torch.Tensor, tau: float) -> torch.Tensor:
    total = q.new_zeros(())
    for i in range(len(q)):
        similarity = [torch.dot(q[i] / q[i].norm(), k[j] / k[j].norm()) / tau for j in range(len(k))]
        total = total - (similarity[i] - torch.logsumexp(torch.stack(similarity), 0))
    return 2 * tau * total / len(q)


def test_loss_is_the_reference_in_fp64() -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(7, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ours, want = info_nce(q, k, 0.2), reference_loss(q, k.detach(), 0.2)
    assert float((ours - want).detach()) == pytest.approx(0, abs=1e-12)
    (ours_grad,) = torch.autograd.grad(ours, q)
    (want_grad,) = torch.autograd.grad(want, q)
    torch.testing.assert_close(ours_grad, want_grad, atol=1e-12, rtol=0)
    assert not info_nce(q.detach(), k, 0.2).requires_grad


def test_chance_level_on_random_features() -> None:
    torch.manual_seed(0)
    losses = [info_nce(torch.randn(256, 4096), torch.randn(256, 4096), 0.2) for _ in range(4)]
    assert float(torch.stack(losses).mean()) == pytest.approx(2 * 0.2 * math.log(256), abs=5e-3)


def reference_forward(moco: MoCo, images: torch.Tensor, target: bool) -> torch.Tensor:
    """Projector and predictor spelled out with torch's own batch norm over the batch."""

    def head(modules: torch.nn.Sequential, x: torch.Tensor) -> torch.Tensor:
        for module in modules:
            if isinstance(module, torch.nn.BatchNorm1d):
                x = F.batch_norm(x, None, None, module.weight, module.bias, training=True, eps=module.eps)
            else:
                x = module(x)
        return x

    network = moco._target[0].network if target else torch.nn.ModuleDict(dict(moco.named_children()))
    features = network["encoder"](images, Compression(), torch.arange(8))
    projected = head(network["projector"], features)
    return projected if target else head(moco.predictor, projected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_method_is_the_reference_in_fp64(
    make_moco: Callable[..., MoCo], make_batch: Callable[..., object], make_plan: MakePlan, symmetric: bool
) -> None:
    moco = make_moco(symmetric=symmetric, temperature=0.3).double()
    moco._target[0].to(torch.device("cpu"), torch.float64)
    batch = make_batch(dtype=torch.float64)
    output = moco(batch, make_plan(moco))
    one, two = batch.views  # type: ignore[attr-defined]
    want = reference_loss(reference_forward(moco, one, False), reference_forward(moco, two, True), 0.3)
    if symmetric:
        want = want + reference_loss(reference_forward(moco, two, False), reference_forward(moco, one, True), 0.3)
    assert float(output.loss - want) == pytest.approx(0, abs=1e-10)


def test_gradients_only_where_they_belong(
    make_moco: Callable[..., MoCo], make_batch: Callable[..., object], make_plan: MakePlan
) -> None:
    moco = make_moco()
    moco(make_batch(), make_plan(moco, compression(None, 0.5))).loss.backward()
    with_gradient = {name for name, p in moco.named_parameters() if p.grad is not None}
    trainable = {name for name, p in moco.named_parameters() if p.requires_grad}
    assert with_gradient == trainable
    assert {name for name, _ in moco.named_parameters()} - trainable == {
        "encoder.patch.weight",
        "encoder.patch.bias",
    }
    assert all(p.grad is None for p in moco._target[0].network.parameters())


def test_momentum_moves_after_the_step_and_only_then(
    make_moco: Callable[..., MoCo], make_batch: Callable[..., object], make_plan: MakePlan
) -> None:
    moco = make_moco()
    before = copy.deepcopy(moco.state())
    output = moco(make_batch(), make_plan(moco))
    after_forward = moco.state()
    names = [name for name, _ in moco._target[0].network.named_parameters()]
    assert all(torch.equal(before[n], after_forward[n]) for n in names)
    with torch.no_grad():
        for parameter in moco.parameters():
            parameter.add_(1.0)
    moco.after_step(make_plan(moco, momentum=0.9), output)
    for name in names:
        torch.testing.assert_close(moco.state()[name], before[name] + 0.1)


def test_momentum_follows_a_cosine_to_one() -> None:
    moco = MoCo.momentum
    holder = type("Holder", (), {"config": MoCoConfig(momentum=0.99)})()
    assert moco(holder, 0.0) == pytest.approx(0.99)
    assert moco(holder, 0.5) == pytest.approx(0.995)
    assert moco(holder, 1.0) == 1.0
    assert moco(holder, 0.25) == pytest.approx(1 - 0.5 * (1 + math.cos(math.pi / 4)) * 0.01)


def test_keys_are_scaled_but_never_dropped(make_moco: Callable[..., MoCo], make_plan: MakePlan) -> None:
    moco = make_moco()
    both = make_plan(moco, compression(16, 0.5))
    assert both.query.sequence_length(32, 8) == 3
    assert both.key.sequence_length(32, 8) == 5
    assert moco.tokens(both) == 8


def test_costs_by_hand(make_moco: Callable[..., MoCo], make_plan: MakePlan) -> None:
    moco = make_moco()
    assert moco.sample_cost(make_plan(moco)) == pytest.approx(4.0)
    # One of three blocks frozen (and the embedding): (3 - 2/3) * 17 + 17 tokens over 17.
    assert moco.sample_cost(make_plan(moco, frozen=2)) == pytest.approx(3 - 2 / 3 + 1)
    assert moco.sample_cost(make_plan(moco, frozen=1)) == pytest.approx(4.0)
    dropped = make_plan(moco, compression(None, 0.5))
    assert moco.sample_cost(dropped) == pytest.approx((3 * 9 + 17) / 17)
    assert moco.nominal_sample_cost(dropped) == pytest.approx((3 * 8.5 + 17) / 17)
    both = make_moco(symmetric=True)
    assert both.sample_cost(make_plan(both)) == pytest.approx(8.0)


def test_state_round_trip(
    make_moco: Callable[..., MoCo], make_batch: Callable[..., object], make_plan: MakePlan
) -> None:
    moco = make_moco()
    moco.after_step(make_plan(moco, momentum=0.5), moco(make_batch(), make_plan(moco)))
    saved = copy.deepcopy(moco.state())
    other = make_moco()
    other.load(saved)
    assert all(torch.equal(other.state()[n], saved[n]) for n in saved)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"temperature": 0.0}, r"method\.temperature must be above 0"),
        ({"momentum": 1.5}, r"method\.momentum must be in \[0, 1\], got 1\.5"),
        ({"crop_min": 0.0}, r"method\.crop_min must be a share"),
    ],
)
def test_bad_values_are_refused(arguments: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        MoCoConfig(**arguments)  # type: ignore[arg-type]
