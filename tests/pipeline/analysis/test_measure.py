"""Gradient errors of real methods against plain backward passes, over ranks and passes, and without a trace."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.analysis.gradients import loss_gradient, trainable
from pipeline.analysis.measure import PanelErrors, compressed, grid, measure
from pipeline.analysis.results import Panel
from pipeline.compression.schedule import Cell
from pipeline.methods.moco import MoCo
from pipeline.models.vit import ViTConfig
from pipeline.schedules import StepPlan

CELLS = [Cell(8, 0.0), Cell(8, 0.5), Cell(16, 0.0), Cell(16, 0.5)]
SUB_BATCH, SUB_BATCHES = 8, 5


@pytest.fixture
def batches(make_batch: Callable[..., object]) -> list[object]:
    return [make_batch(SUB_BATCH, start=SUB_BATCH * j) for j in range(SUB_BATCHES)]


def reference(method: MoCo, batches: list[object], plan: StepPlan) -> torch.Tensor:
    """Return every sub-batch's gradient by `backward`, in fp64."""
    rows = []
    for batch in batches:
        method.zero_grad(set_to_none=True)
        method(batch, plan).loss.backward()
        learning = [p for p in method.parameters() if p.requires_grad]
        rows.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in learning]))
    method.zero_grad(set_to_none=True)
    return torch.stack(rows).double()


def test_errors_are_those_of_plain_backward_passes(
    make_moco: Callable[..., MoCo], make_plan: Callable[..., StepPlan], batches: list[object]
) -> None:
    method = make_moco()
    plan = make_plan(method)
    found = measure(method, batches, plan, CELLS, SUB_BATCH)
    whole = reference(method, batches, plan)
    for cell, error in zip(CELLS, found.cells, strict=True):
        own = reference(method, batches, compressed(plan, method, cell))
        difference = own - whole
        products = difference @ difference.T
        count = len(batches)
        bias = float((products.sum() - products.trace()) / (count * (count - 1)))
        variance = SUB_BATCH * float((own - own.mean(0)).square().sum()) / (count - 1)
        scale = float(difference.square().sum(1).mean())
        assert error.squared_bias == pytest.approx(bias, abs=1e-4 * scale)
        assert error.squared_bias_plugin == pytest.approx(float(difference.mean(0).square().sum()), rel=1e-4)
        assert error.variance == pytest.approx(variance, rel=1e-4)
        assert error.cost == method.sample_cost(compressed(plan, method, cell))
    assert found.reference.squared_mean() == pytest.approx(float(whole.mean(0).square().sum()), rel=1e-5)
    assert found.parameters == whole.shape[1]


def panel(found: PanelErrors, budget: float) -> Panel:
    return Panel(0, 0, "init", 0, found.parameters, budget, 1.0, 1.0, [], found.cells)


def test_no_compression_has_no_bias_and_only_the_variance_of_its_batch(
    make_moco: Callable[..., MoCo], make_plan: Callable[..., StepPlan], batches: list[object]
) -> None:
    method = make_moco()
    plan = make_plan(method)
    found = measure(method, batches, plan, CELLS, SUB_BATCH)
    none = found.cells[0]
    assert (none.squared_bias, none.squared_bias_plugin, set(none.squared_bias_without)) == (0.0, 0.0, {0.0})
    assert none.variance == SUB_BATCH * found.reference.variance()
    batch_size = 32
    whole = panel(found, batch_size * method.sample_cost(plan))
    assert whole.ca_mse(none) == pytest.approx(none.variance / batch_size, rel=1e-12)
    assert all(error.squared_bias_plugin > 0 for error in found.cells[1:])


def test_the_order_of_sub_batches_and_the_split_into_passes_do_not_matter(
    make_moco: Callable[..., MoCo], make_plan: Callable[..., StepPlan], batches: list[object]
) -> None:
    method = make_moco()
    plan = make_plan(method)
    whole = measure(method, batches, plan, CELLS, SUB_BATCH)
    backwards = measure(method, batches[::-1], plan, CELLS, SUB_BATCH)
    for one, other in zip(whole.cells, backwards.cells, strict=True):
        assert one.variance == pytest.approx(other.variance, rel=1e-5)
        assert one.squared_bias == pytest.approx(other.squared_bias, rel=1e-3, abs=1e-6 * one.variance)
    for i, cell in enumerate(CELLS):
        assert measure(method, batches, plan, [cell], SUB_BATCH).cells == [whole.cells[i]]


def test_only_parameters_that_still_learn_count_at_the_cost_that_is_left(
    make_moco: Callable[..., MoCo], make_plan: Callable[..., StepPlan], batches: list[object]
) -> None:
    method = make_moco()
    frozen = make_plan(method, frozen=2)
    found = measure(method, batches, frozen, CELLS[:2], SUB_BATCH)
    learning = trainable(method, frozen)
    assert not {id(p) for layer in method.layers()[:2] for p in layer} & {id(p) for p in learning}
    assert found.parameters == sum(p.numel() for p in learning)
    assert found.cells[0].cost == method.sample_cost(frozen) < method.sample_cost(make_plan(method))


def test_measuring_leaves_no_trace(
    make_moco: Callable[..., MoCo], make_plan: Callable[..., StepPlan], batches: list[object]
) -> None:
    method = make_moco()
    before = {name: t.clone() for name, t in {**method.state_dict(), **method.state()}.items()}
    generator = torch.get_rng_state()
    measure(method, batches, make_plan(method), CELLS, SUB_BATCH)
    after = {**method.state_dict(), **method.state()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(p.grad is None for p in method.parameters())


RANKS = """
    import json, sys, torch
    from dataclasses import asdict
    sys.path.insert(0, "{tests}")
    from pipeline import distributed
    from pipeline.analysis.measure import measure
    from pipeline.compression import Compression
    from pipeline.compression.schedule import Cell
    from pipeline.methods import build_method
    from pipeline.methods.{name} import {kind}
    from pipeline.models.vit import ViT, ViTConfig
    from pipeline.schedules import StepPlan
    from conftest import FakeBatch

    world = distributed.start()
    torch.manual_seed(0)
    model = ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 3, 3, reference_length=17)
    method = build_method({kind}(hidden_dim=64, out_dim=32, **{extra}), ViT(model, seed=0))
    plan = StepPlan(0.5, 1e-3, 0.1, 0.99, (1e-3,) * 4, Compression(), Compression(), 1e-3, 0.07)
    batches = []
    for j in range(5):
        generator = torch.Generator().manual_seed(j)
        views = [torch.randn(8, 3, s.size, s.size, generator=generator)[world.rank::world.size] for s in method.views()]
        batches.append(FakeBatch(tuple(views), torch.arange(8 * j, 8 * j + 8)[world.rank::world.size]))
    found = measure(method, batches, plan, [Cell(8, 0.0), Cell(8, 0.5), Cell(16, 0.0)], 8)
    print(json.dumps([asdict(cell) for cell in found.cells]))
"""


@pytest.mark.parametrize(("name", "kind"), [("moco", "MoCoConfig"), ("simclr", "SimCLRConfig"), ("dino", "DINOConfig")])
def test_two_ranks_find_what_one_finds(run_ranks: Callable[..., list[str]], name: str, kind: str) -> None:
    extra = {"small_size": 16, "small_crops": 2} if name == "dino" else {}
    code = RANKS.format(tests=Path(__file__).parents[1], name=name, kind=kind, extra=extra)
    alone = json.loads(run_ranks(code, 1)[0].splitlines()[-1])
    first, second = (json.loads(output.splitlines()[-1]) for output in run_ranks(code, 2))
    assert first == second
    for one, two in zip(alone, first, strict=True):
        noise = 1e-4 * one["variance"]
        assert two.pop("variance_without") == pytest.approx(one.pop("variance_without"), rel=1e-2)
        assert two.pop("squared_bias_without") == pytest.approx(
            one.pop("squared_bias_without"), rel=1e-2, abs=10 * noise
        )
        assert two == pytest.approx(one, rel=1e-3, abs=noise)


def test_the_default_grid_is_the_papers_at_240_pixels() -> None:
    cells = grid([], [0.0, 0.25, 0.5, 0.75, 0.9], ViTConfig("vit_base_patch16_224", 240))
    assert sorted({cell.patch_size for cell in cells}) == [16, 20, 24, 30, 40, 48]
    assert len(cells) == 30
    assert [c.patch_size for c in grid([12, 8], [0.0], ViTConfig("vit_tiny_patch16_224", 48, 8))] == [8, 12]


@pytest.mark.parametrize(
    ("sizes", "dropouts", "sentence"),
    [
        ([16, 23], [0.0], r"patch_sizes must divide the run's image_size=240, got 23; sizes that do: 16, 20, 24"),
        ([], [1.0], r"dropouts must be shares of the tokens in \[0, 1\), got \[1\.0\]"),
        ([], [], r"dropouts must be"),
    ],
)
def test_grids_that_cannot_be(sizes: list[int], dropouts: list[float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        grid(sizes, dropouts, ViTConfig("vit_base_patch16_224", 240))


def test_a_gradient_goes_past_the_grad_fields_and_into_a_vector(
    make_moco: Callable[..., MoCo], make_plan: Callable[..., StepPlan], batches: list[object]
) -> None:
    method = make_moco()
    plan = replace(make_plan(method), last_layer_rate=0.0)
    vector = loss_gradient(method, batches[0], plan, trainable(method, plan))
    assert torch.equal(vector.double(), reference(method, batches[:1], plan)[0])
