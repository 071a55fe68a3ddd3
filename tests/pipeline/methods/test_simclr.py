"""SimCLR against an independent fp64 reference, and what it costs."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from pipeline.compression import Compression
from pipeline.compression.schedule import compression
from pipeline.methods.simclr import SimCLR, SimCLRConfig
from pipeline.models.vit import ViT, ViTConfig
from pipeline.schedules import StepPlan

MakePlan = Callable[..., StepPlan]


def make_simclr(**changes: object) -> SimCLR:
    torch.manual_seed(0)
    config = ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 3, 3, reference_length=17)
    return SimCLR(SimCLRConfig(**({"hidden_dim": 64, "out_dim": 32} | changes)), ViT(config, seed=0))  # type: ignore[arg-type]


def reference_projection(simclr: SimCLR, images: torch.Tensor) -> torch.Tensor:
    """Spell the projector out: three linear layers, torch's batch norm over the batch, ReLU but at the end."""
    x = simclr.encoder(images, Compression(), torch.arange(8))
    linear = [m for m in simclr.projector if isinstance(m, torch.nn.Linear)]
    norms = [m for m in simclr.projector if isinstance(m, torch.nn.BatchNorm1d)]
    assert len(linear) == len(norms) == 3
    for i in range(3):
        x = F.batch_norm(x @ linear[i].weight.T, None, None, norms[i].weight, norms[i].bias, training=True)
        x = x.clamp_min(0) if i < 2 else x
    return x / x.norm(dim=1, keepdim=True)


def reference_loss(a: torch.Tensor, b: torch.Tensor, tau: float) -> torch.Tensor:
    """Take -log softmax of the positive among everything but oneself, over the 2B x 2B similarities."""
    both = torch.cat([a, b])
    similarity = (both @ both.T / tau).masked_fill(torch.eye(len(both), dtype=torch.bool), float("-inf"))
    positive = torch.cat([torch.arange(8, 16), torch.arange(0, 8)])
    return -similarity.log_softmax(1)[torch.arange(16), positive]


@pytest.mark.parametrize("symmetric", [True, False])
def test_method_is_the_reference_in_fp64(
    make_batch: Callable[..., object], make_plan: MakePlan, symmetric: bool
) -> None:
    simclr = make_simclr(symmetric=symmetric, temperature=0.3).double()
    batch = make_batch(dtype=torch.float64)
    loss = simclr(batch, make_plan(simclr)).loss
    one, two = (reference_projection(simclr, view) for view in batch.views)  # type: ignore[attr-defined]
    rows = reference_loss(one, two, 0.3)
    want = rows.mean() if symmetric else rows[:8].mean()
    torch.testing.assert_close(loss, want, atol=1e-10, rtol=0)
    trainable = [p for p in simclr.parameters() if p.requires_grad]
    for got, expected in zip(torch.autograd.grad(loss, trainable), torch.autograd.grad(want, trainable), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-9, rtol=0)


def test_everything_learns_but_the_patch_projection_and_the_last_shift(
    make_batch: Callable[..., object], make_plan: MakePlan
) -> None:
    simclr = make_simclr()
    simclr(make_batch(), make_plan(simclr)).loss.backward()
    still = {name for name, p in simclr.named_parameters() if p.grad is None}
    assert still == {"encoder.patch.weight", "encoder.patch.bias", "projector.7.bias"}


def test_both_sides_are_compressed_alike(make_plan: MakePlan) -> None:
    simclr = make_simclr()
    plan = make_plan(simclr, compression(None, 0.5))
    assert plan.key == plan.query
    assert simclr.tokens(plan) == 2 * 9


def test_costs_by_hand(make_plan: MakePlan) -> None:
    simclr = make_simclr()
    assert simclr.sample_cost(make_plan(simclr)) == pytest.approx(6.0)
    # Two of three blocks frozen: 3 - 2 * 2/3 forwards a side.
    assert simclr.sample_cost(make_plan(simclr, frozen=3)) == pytest.approx(2 * (3 - 4 / 3))
    dropped = make_plan(simclr, compression(None, 0.5))
    assert simclr.sample_cost(dropped) == pytest.approx(3 * 2 * 9 / 17)
    assert simclr.nominal_sample_cost(dropped) == pytest.approx(3 * 2 * 8.5 / 17)


def test_the_views_are_of_one_distribution() -> None:
    one, two = make_simclr().views()
    assert one == two
    assert one.size == 32


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"temperature": 0.0}, r"method\.temperature must be above 0"),
        ({"out_dim": 0}, r"method\.out_dim and method\.hidden_dim must be at least 1, got 0"),
        ({"crop_min": 2.0}, r"method\.crop_min must be a share"),
    ],
)
def test_bad_values_are_refused(arguments: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SimCLRConfig(**arguments)  # type: ignore[arg-type]
