"""DINO against an independent fp64 reference and hand-computed schedules."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from pipeline.compression import Compression
from pipeline.compression.schedule import compression
from pipeline.methods.base import StepOutput
from pipeline.methods.dino import DINO, DINOConfig
from pipeline.models.heads import PrototypeHead
from pipeline.models.vit import ViT, ViTConfig
from pipeline.schedules import StepPlan

MakePlan = Callable[..., StepPlan]
SMALL = {"out_dim": 24, "hidden_dim": 40, "bottleneck_dim": 16, "small_crops": 3, "small_size": 16}


@dataclass(frozen=True)
class Crops:
    views: tuple[torch.Tensor, ...]
    index: torch.Tensor


def make_dino(**changes: object) -> DINO:
    torch.manual_seed(0)
    config = ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 3, 3, reference_length=17)
    return DINO(DINOConfig(**(SMALL | changes)), ViT(config, seed=0))  # type: ignore[arg-type]


def in_fp64(dino: DINO) -> DINO:
    dino.double().prepare(torch.device("cpu"), torch.float64)
    return dino


def make_crops(small: int = 3, dtype: torch.dtype = torch.float32) -> Crops:
    generator = torch.Generator().manual_seed(0)
    sizes = [32, 32, *[16] * small]
    return Crops(tuple(torch.randn(6, 3, s, s, generator=generator, dtype=dtype) for s in sizes), torch.arange(40, 46))


def reference_logits(network: torch.nn.ModuleDict, images: torch.Tensor, view: int) -> torch.Tensor:
    """Spell the head out: three linear layers with GELU, unit bottleneck, unit prototypes times their lengths."""
    x = network["encoder"](images, Compression(), torch.arange(40, 46), view)
    head = network["head"]
    assert isinstance(head, PrototypeHead)
    first, second, third = (m for m in head.mlp if isinstance(m, torch.nn.Linear))
    x = 0.5 * (y := x @ first.weight.T + first.bias) * (1 + torch.erf(y / math.sqrt(2)))
    x = 0.5 * (y := x @ second.weight.T + second.bias) * (1 + torch.erf(y / math.sqrt(2)))
    x = x @ third.weight.T + third.bias
    x = x / x.norm(dim=1, keepdim=True)
    directions = head.prototypes.direction
    prototypes = directions / directions.norm(dim=1, keepdim=True)
    return x @ prototypes.T * (1.0 if head.prototypes.length is None else head.prototypes.length.T)


def reference_loss(dino: DINO, crops: Crops, keys: list[int], queries: list[int], temperature: float) -> torch.Tensor:
    student = torch.nn.ModuleDict({"encoder": dino.encoder, "head": dino.head})
    terms = []
    for k in keys:
        teacher = reference_logits(dino._teacher[0].network, crops.views[k], k).detach()
        target = torch.softmax((teacher - dino._center) / temperature, 1)
        for q in queries:
            if q != k:
                logs = torch.log_softmax(reference_logits(student, crops.views[q], q) / 0.2, 1)
                terms.append(-(target * logs).sum(1).mean())
    return sum(terms) / len(terms)  # type: ignore[return-value]


@pytest.mark.parametrize("norm_last_layer", [True, False])
@pytest.mark.parametrize(
    ("symmetric", "keys", "queries"), [(False, [1], [0, 2, 3, 4]), (True, [0, 1], [0, 1, 2, 3, 4])]
)
def test_method_is_the_reference_in_fp64(
    make_plan: MakePlan, symmetric: bool, keys: list[int], queries: list[int], norm_last_layer: bool
) -> None:
    dino = in_fp64(make_dino(symmetric=symmetric, norm_last_layer=norm_last_layer, student_temperature=0.2))
    dino._center = torch.randn(24, dtype=torch.float64) / 10
    crops = make_crops(dtype=torch.float64)
    loss = dino(crops, make_plan(dino, teacher_temperature=0.05)).loss
    want = reference_loss(dino, crops, keys, queries, 0.05)
    torch.testing.assert_close(loss, want, atol=1e-11, rtol=0)
    parameters = list(dino.parameters())
    for got, expected in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(want, parameters), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


def test_a_head_of_uniform_teacher_and_student_is_at_chance(make_plan: MakePlan) -> None:
    dino = make_dino()
    for head in (dino.head, dino._teacher[0].network["head"]):
        assert isinstance(head, PrototypeHead)
        torch.nn.init.ones_(head.prototypes.direction)
    assert float(dino(make_crops(), make_plan(dino)).loss.detach()) == pytest.approx(math.log(24), abs=1e-5)


def test_entropies_tell_both_collapses_apart() -> None:
    always_one = DINO._entropies(torch.eye(4)[[2, 2, 2]])
    assert (float(always_one["teacher_entropy_ratio"]), float(always_one["prototype_entropy_ratio"])) == (0, 0)
    nothing = DINO._entropies(torch.full((3, 4), 0.25))
    assert float(nothing["teacher_entropy_ratio"]) == pytest.approx(1)
    sound = DINO._entropies(torch.eye(4))
    assert float(sound["teacher_entropy_ratio"]) == 0
    assert float(sound["prototype_entropy_ratio"]) == pytest.approx(1)


def test_the_center_follows_the_teachers_mean_logits(make_plan: MakePlan) -> None:
    dino = in_fp64(make_dino())
    crops, plan = make_crops(dtype=torch.float64), make_plan(dino)
    dino._center = torch.full((24,), 0.5, dtype=torch.float64)
    want = reference_logits(dino._teacher[0].network, crops.views[1], 1).mean(0)
    output = dino(crops, plan)
    assert torch.equal(dino._center, torch.full((24,), 0.5, dtype=torch.float64))
    dino.after_step(plan, output)
    torch.testing.assert_close(dino._center, 0.9 * 0.5 + 0.1 * want, atol=1e-12, rtol=0)


def test_the_teacher_moves_after_the_step(make_plan: MakePlan) -> None:
    dino = make_dino()
    plan, before = make_plan(dino, momentum=0.9), copy.deepcopy(dino.state())
    output = dino(make_crops(), plan)
    with torch.no_grad():
        for parameter in dino.parameters():
            parameter.add_(1.0)
    dino.after_step(plan, output)
    for name, tensor in dino.state().items():
        if name not in ("center", "gaps"):
            torch.testing.assert_close(tensor, before[name] + 0.1)


def test_gradients_only_in_the_student(make_plan: MakePlan) -> None:
    dino = make_dino()
    dino(make_crops(), make_plan(dino)).loss.backward()
    assert all(p.grad is not None for p in dino.parameters())
    assert all(p.grad is None for p in dino._teacher[0].network.parameters())
    assert dino.representation is dino._teacher[0].network["encoder"]


def test_schedules_by_hand() -> None:
    dino = make_dino(teacher_warmup=0.2, last_layer_start=0.05)
    assert [dino.teacher_temperature(p) for p in (0.0, 0.1, 0.2, 1.0)] == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert [dino.momentum(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.996, 0.998, 1.0])
    assert [dino.last_layer_learns(p) for p in (0.0, 0.049, 0.05, 1.0)] == [False, False, True, True]
    assert make_dino(teacher_warmup=0.0).teacher_temperature(0.0) == 0.07


def test_the_last_layer_is_the_prototypes() -> None:
    assert [p.shape for p in make_dino().last_layer()] == [(24, 16)]
    assert [p.shape for p in make_dino(norm_last_layer=False).last_layer()] == [(24, 16), (24, 1)]


def test_small_crops_are_never_compressed_and_the_teacher_never_drops(make_plan: MakePlan) -> None:
    dino = make_dino()
    plan = make_plan(dino, compression(16, 0.5))
    lengths = [each.compression.sequence_length(each.image_size, 8) for each in dino.forwards(plan)]
    assert lengths == [3, 5, 5, 5, 5]
    assert [each.learns for each in dino.forwards(plan)] == [True, True, True, True, False]


def test_costs_by_hand(make_plan: MakePlan) -> None:
    dino = make_dino()
    # 17 tokens in a large crop, 5 in each of three small ones.
    assert dino.sample_cost(make_plan(dino)) == pytest.approx((3 * 17 + 3 * 15 + 17) / 17)
    assert dino.sample_cost(make_plan(dino, frozen=2)) == pytest.approx(((3 - 2 / 3) * (17 + 15) + 17) / 17)
    both = make_dino(symmetric=True)
    assert both.sample_cost(make_plan(both)) == pytest.approx((3 * 2 * 17 + 3 * 15 + 2 * 17) / 17)
    dropped = make_plan(dino, compression(None, 0.5))
    assert dino.nominal_sample_cost(dropped) == pytest.approx((3 * 8.5 + 3 * 15 + 17) / 17)


def test_views_are_two_large_crops_and_the_small_ones() -> None:
    views = make_dino(large_scale=[0.25, 1.0], small_scale=[0.05, 0.25]).views()
    assert [view.size for view in views] == [32, 32, 16, 16, 16]
    assert [view.scale for view in views[1:3]] == [(0.25, 1.0), (0.05, 0.25)]


def test_state_round_trip(make_plan: MakePlan) -> None:
    dino = make_dino()
    plan = make_plan(dino, momentum=0.5)
    dino.after_step(plan, StepOutput(torch.zeros(()), {}, {"center": torch.ones(24)}))
    saved = copy.deepcopy(dino.state())
    other = make_dino()
    other.load(saved)
    assert all(torch.equal(other.state()[n], saved[n]) for n in saved)
    assert torch.allclose(other._center, torch.full((24,), 0.1))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"teacher_temperature": 0.0}, r"method\.teacher_temperature must be above 0"),
        ({"momentum": 1.5}, r"method\.momentum must be in \[0, 1\], got 1\.5"),
        ({"small_crops": -1}, r"method\.small_crops must not be negative"),
        ({"small_scale": [0.4]}, r"method\.small_scale must be two rising shares"),
        ({"large_scale": [1.0, 0.4]}, r"method\.large_scale must be two rising shares"),
    ],
)
def test_bad_values_are_refused(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        DINOConfig(**arguments)  # type: ignore[arg-type]


def test_small_crops_that_patches_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"method\.small_size must be a multiple of model\.patch_size=8, got 20"):
        make_dino(small_size=20)
    with pytest.raises(ValueError, match=r"method\.small_size must not be above model\.image_size=32, got 40;"):
        make_dino(small_size=40)


def test_without_small_crops(make_plan: MakePlan) -> None:
    dino = make_dino(small_crops=0, small_size=20)
    assert dino.tokens(make_plan(dino)) == 2 * 17
    assert float(dino(make_crops(small=0), make_plan(dino)).loss.detach()) > 0
