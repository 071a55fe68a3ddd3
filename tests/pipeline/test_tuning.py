"""The choice of a compression on the live model: a scripted optimum, gradients by hand, and no trace in a run."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import distributed
from pipeline.checkpoint import TrainState
from pipeline.compression import Adaptive, Compression, FittedAdaptive, NoCompression
from pipeline.compression.adaptive import GridCell
from pipeline.compression.schedule import compression
from pipeline.engine import Engine
from pipeline.engine_config import EngineConfig, Precision
from pipeline.methods import Method
from pipeline.methods.dino import DINO, DINOConfig
from pipeline.methods.moco import MoCo, MoCoConfig
from pipeline.methods.simclr import SimCLR, SimCLRConfig
from pipeline.models.blocks import CompiledBlocks
from pipeline.models.vit import ViT, ViTConfig
from pipeline.optim import OptimConfig
from pipeline.prewarm import prewarm
from pipeline.schedules import StepPlan, Unit
from pipeline.tuning import GradientError, LiveErrors, NoTuning, Tuner, tuner_for

CPU = torch.device("cpu")
GRID = Adaptive().fitted(240, 16)
BATCH = 64


@dataclass(frozen=True)
class Crops:
    """A batch that no loader had to make."""

    views: tuple[torch.Tensor, ...]
    index: torch.Tensor
    labels: torch.Tensor | None = None


# --- A scripted surface ------------------------------------------------------------------------------------------


def optimum(progress: float) -> tuple[float, float]:
    """Return where the least error lies, as places in the lists of sizes and dropouts: from (4, 3) to none at all."""
    left = 1 - min(1.0, progress / 0.8)
    return 4 * left, 3 * left


def distance(grid: FittedAdaptive, cell: GridCell, progress: float) -> float:
    size, dropout = optimum(progress)
    return abs(grid.patch_sizes.index(cell[0]) - size) + abs(grid.dropouts.index(cell[1]) - dropout)


@dataclass
class Scripted:
    """Measures a bowl around a moving optimum under noise, half of which all cells share."""

    grid: FittedAdaptive
    depth: float = 0.1
    calls: int = 0
    cells: dict[Compression, GridCell] = field(init=False)

    def __post_init__(self) -> None:
        self.cells = {self.grid.compression(cell): cell for cell in self.grid.grid()}

    def __call__(self, batch: Crops, reference: StepPlan, plans: Sequence[StepPlan]) -> list[GradientError]:
        assert reference.query == Compression()
        self.calls += 1
        random = np.random.default_rng(int(batch.index[0]))
        shared = random.normal(0, 0.3, 8)
        return [self._error(plan, shared + random.normal(0, 0.3, 8)) for plan in plans]

    def _error(self, plan: StepPlan, noise: np.ndarray) -> GradientError:
        samples = 1 + self.depth * distance(self.grid, self.cells[plan.query], plan.progress) ** 2 + noise
        return GradientError(float(samples.mean()), [float(np.delete(samples, i).mean()) for i in range(8)])


@pytest.fixture(scope="module")
def shapes() -> Method:
    """Return a method without weights, for its costs."""
    with torch.device("meta"):
        vit = ViT(ViTConfig("vit_tiny_patch16_224", 240, 16, 48, 1, 3), seed=0)
        return MoCo(MoCoConfig(hidden_dim=8, out_dim=8), vit)


def walk(
    method: Method, measure: Scripted, state: TrainState, budget: float
) -> Iterator[tuple[float, GridCell, TrainState]]:
    """Yield progress, cell and state after every step of a run from `state` on."""
    tuner = Tuner(measure.grid, method, BATCH, measure)
    while state.cost < budget:
        progress = state.cost / budget
        query = measure.grid.at(progress)
        plan = StepPlan(progress, 1e-3, 0.1, 0.99, (1e-3, 1e-3), query, method.key_compression(query))
        plan = tuner.plan(plan, state)
        assert plan.key == method.key_compression(plan.query)
        tuner.tune(Crops((), torch.tensor([state.step])), plan, state)
        state.advance(BATCH, method.sample_cost(plan))
        yield progress, measure.cells[plan.query], state


def test_the_tuner_follows_a_moving_optimum_within_its_share(shapes: Method) -> None:
    measure, state = Scripted(GRID), TrainState()
    cells = []
    for progress, cell, now in walk(shapes, measure, state, budget=1e6):
        assert now.tuning.get("spent", 0.0) <= GRID.share * now.cost
        cells.append(cell)
        if progress > 0.1:
            assert distance(GRID, cell, progress) <= 2.5, (progress, cell)
    assert cells[0] == (24, 0.5)
    assert cells[-1] == (16, 0.0)
    assert len(set(cells)) >= 6
    # What it may spend it spends, but for less than one measurement.
    assert state.tuning["spent"] > 0.95 * GRID.share * state.cost


def test_without_a_difference_it_hardly_ever_moves_whatever_it_may_spend(shapes: Method) -> None:
    measure, state = Scripted(replace(GRID, share=0.5), depth=0.0), TrainState()
    cells = []
    for _, cell, now in walk(shapes, measure, state, budget=1e5):
        assert now.tuning.get("spent", 0.0) <= 0.5 * now.cost
        cells.append(cell)
    assert state.tuning["spent"] > 0.45 * state.cost
    assert measure.calls > 50
    moves = sum(one != two for one, two in pairwise(cells))
    assert moves < 0.1 * measure.calls


SMALL = replace(GRID, share=0.3, dropouts=[0.0, 0.5, 0.75])
SMALL_BUDGET = 3e4


def test_a_second_run_is_the_same(shapes: Method) -> None:
    runs = [[cell for _, cell, _ in walk(shapes, Scripted(SMALL), TrainState(), SMALL_BUDGET)] for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 3


@pytest.fixture(scope="module")
def whole(shapes: Method) -> list[tuple[GridCell, str]]:
    """Return each step's cell of a whole run, and its state as a checkpoint would hold it."""
    steps = walk(shapes, Scripted(SMALL), TrainState(), SMALL_BUDGET)
    return [(cell, json.dumps(asdict(state))) for _, cell, state in steps]


@settings(max_examples=25, deadline=None)
@given(at=st.floats(0, 1))
def test_a_run_goes_on_from_any_step_as_if_nothing_had_been(
    shapes: Method, whole: list[tuple[GridCell, str]], at: float
) -> None:
    stop = round(at * (len(whole) - 1))
    state = TrainState(**json.loads(whole[stop][1]))
    rest = [(cell, json.dumps(asdict(now))) for _, cell, now in walk(shapes, Scripted(SMALL), state, SMALL_BUDGET)]
    assert rest == whole[stop + 1 :]


# --- Refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"unit": Unit.steps},
            r"budget\.unit must be cost with compression=adaptive.* got steps; say budget\.unit=cost",
        ),
        (
            {"batch_size": 60},
            r"compression\.sub_batches must cut .* got 8 for batch_size=60 and 1 process\(es\); take a",
        ),
        ({"batch_size": 24, "processes": 2}, r"got 8 for batch_size=24 and 2 process\(es\); take a divisor of 12, or"),
        ({"batch_size": 8}, r"into at least 2 samples .* got 8 for batch_size=8"),
    ],
)
def test_budgets_that_cannot_pay_and_batches_that_cannot_be_cut_are_refused(
    shapes: Method, changes: dict[str, object], sentence: str
) -> None:
    arguments = {"unit": Unit.cost, "batch_size": 64, "processes": 4, "seed": 0} | {"processes": 1} | changes
    with pytest.raises(ValueError, match=sentence):
        tuner_for(GRID, shapes, **arguments)  # type: ignore[arg-type]


def test_other_schedules_are_left_alone(shapes: Method) -> None:
    tuner = tuner_for(NoCompression(), shapes, unit=Unit.steps, batch_size=7, processes=1, seed=0)
    plan, state = StepPlan(0.5, 1e-3, 0.1, 0.99, (1e-3,)), TrainState()
    assert type(tuner) is NoTuning
    assert tuner.plan(plan, state) is plan
    assert tuner.reachable(plan) == [plan]
    assert tuner.tune(Crops((), torch.empty(0)), plan, state).cost == 0
    assert state == TrainState()


def test_every_cell_is_reachable(shapes: Method) -> None:
    tuner = tuner_for(GRID, shapes, unit=Unit.cost, batch_size=64, processes=1, seed=0)
    plans = tuner.reachable(StepPlan(0.5, 1e-3, 0.1, 0.99, (1e-3,)))
    assert [plan.query for plan in plans] == [GRID.compression(cell) for cell in GRID.grid()]
    assert all(plan.key == shapes.key_compression(plan.query) for plan in plans)


# --- The live model ----------------------------------------------------------------------------------------------


def make_method(name: str, compiled: bool = False) -> Method:
    distributed.start()
    torch.manual_seed(0)
    changes = {"stochastic_depth": 0.2} if name == "dino" else {}
    vit = ViT(ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 3, 3, reference_length=17, compile=compiled, **changes), 0)
    if name == "dino":
        return DINO(DINOConfig(24, 40, 16, small_crops=2, small_size=16), vit)
    if name == "simclr":
        return SimCLR(SimCLRConfig(hidden_dim=64, out_dim=32), vit)
    return MoCo(MoCoConfig(hidden_dim=64, out_dim=32), vit)


def make_crops(method: Method, step: int, size: int = 12, dtype: torch.dtype = torch.float32) -> Crops:
    generator = torch.Generator().manual_seed(step)
    views = tuple(torch.randn(size, 3, v.size, v.size, generator=generator, dtype=dtype) for v in method.views())
    return Crops(views, torch.arange(size * step, size * (step + 1)))


def plan_of(method: Method, step: int) -> StepPlan:
    """Return a plan in whose course layers freeze and a last layer starts."""
    frozen = min(step // 2, 2)
    query = compression(16, 0.5) if step % 2 else compression(None, 0.25)
    rates = (0.0,) * frozen + (1e-3,) * (4 - frozen)
    last = 1e-3 if step >= 2 else 0.0
    return StepPlan(step / 6, 1e-3, 0.1, 0.99, rates, query, method.key_compression(query), last, 0.07)


def by_hand(method: Method, crops: Crops, plan: StepPlan, parts: int) -> torch.Tensor:
    """Return the gradients [parts, P] of sub-batches by plain backward passes, frozen layers and all."""
    still = {id(p) for layer in method.layers()[: plan.frozen_layers] for p in layer}
    rows = []
    for i in range(parts):
        piece = slice(i, None, parts)
        method.zero_grad(set_to_none=True)
        method(Crops(tuple(v[piece] for v in crops.views), crops.index[piece]), plan).loss.backward()
        learning = [p for p in method.parameters() if p.requires_grad and id(p) not in still]
        rows.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in learning]))
    method.zero_grad(set_to_none=True)
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["moco", "simclr", "dino"])
def test_errors_are_those_of_gradients_taken_by_hand(name: str) -> None:
    method = make_method(name).double()
    method.prepare(CPU, torch.float64)
    crops = make_crops(method, 0, size=16, dtype=torch.float64)
    reference = replace(plan_of(method, 4), query=Compression(), key=Compression())
    plans = [replace(reference, query=q, key=method.key_compression(q)) for q in (compression(16, 0.5), Compression())]
    found = LiveErrors(method, sub_batches=4, seed=0)(crops, reference, plans)
    dense = by_hand(method, crops, reference, 4)
    for plan, error in zip(plans, found, strict=True):
        gradients = by_hand(method, crops, plan, 4)
        gaps = gradients - dense
        # Equation 10 with a budget of a batch of 16: the variance of a sample is 4 times that of sub-batches of 4, and
        # the mean of inner products of different gaps estimates the squared norm of their mean without bias.
        products = (gaps @ gaps.T).fill_diagonal_(0).sum() / (4 * 3)
        variance = 4 * gradients.var(dim=0, correction=1).sum()
        price = method.sample_cost(plan) / (16 * method.sample_cost(reference))
        want = (products + price * variance) / dense.mean(0).square().sum()
        # Sums are kept in fp32.
        assert error.value == pytest.approx(float(want), rel=1e-4)
        assert len(error.without) == 4


def test_a_last_layer_that_starts_is_measured_alike_by_a_run_that_went_on_and_one_that_was_resumed() -> None:
    found = []
    for resumed in (False, True):
        method = make_method("dino")
        measure = LiveErrors(method, sub_batches=3, seed=0)
        for parameter in method.last_layer():
            # As the engine left it in the step before; a new one has told nobody yet.
            parameter.requires_grad_(resumed)
        plan = plan_of(method, 2)
        assert plan.last_layer_rate > 0
        found.append(measure(make_crops(method, 2), replace(plan, query=Compression(), key=Compression()), [plan]))
    assert found[0] == found[1]


def trace(engine: Engine) -> dict[str, torch.Tensor]:
    method = engine.method
    tensors = {f"state {name}": tensor for name, tensor in method.state().items()}
    tensors |= dict(method.named_parameters()) | dict(method.named_buffers())
    for i, moments in enumerate(engine._engine.optimizer.optimizer.state.values()):
        tensors |= {f"optimizer {i} {name}": torch.as_tensor(each) for name, each in moments.items()}
    return {name: each.detach().clone() for name, each in tensors.items()} | {"random": torch.get_rng_state()}


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("name", ["moco", "simclr", "dino"])
def test_measuring_leaves_no_trace(name: str, precision: Precision) -> None:
    traces, losses = [], []
    for measuring in (False, True):
        method = make_method(name)
        grid = Adaptive(sub_batches=3, evidence=1e9).fitted(32, 8)
        tuner = tuner_for(grid, method, unit=Unit.cost, batch_size=12, processes=1, seed=0)
        engine = Engine(method, EngineConfig(precision), OptimConfig(), local_batch=12, device=CPU)
        state = TrainState(cost=1e9)
        losses.append([])
        for step in range(4):
            plan, crops = plan_of(method, step), make_crops(method, step)
            if measuring:
                assert tuner.tune(crops, plan, state).cost > 0
                assert all(p.grad is None for p in method.parameters())
            losses[-1].append(float(engine.step(crops, plan).loss))
        traces.append(trace(engine))
        assert bool(state.tuning) is measuring
    assert losses[0] == losses[1]
    assert traces[0].keys() == traces[1].keys()
    assert not [name for name in traces[0] if not torch.equal(traces[0][name], traces[1][name])]


def test_the_cost_of_a_measurement_is_that_of_its_forwards_and_backwards() -> None:
    method = make_method("moco")
    grid = Adaptive(sub_batches=3).fitted(32, 8)
    tuner = tuner_for(grid, method, unit=Unit.cost, batch_size=12, processes=1, seed=0)
    state = TrainState(cost=1e9, tuning={"cell": [8, 0.25]})
    tuned = tuner.tune(make_crops(method, 0), replace(plan_of(method, 0)), state)
    # 17 tokens: of 16 patches 16, 12, 8 are kept at dropout 0, 0.25, 0.5; of 4 larger ones 3 at 0.25. The uncompressed
    # cell is a neighbor, and comes for nothing with the reference.
    queries_and_keys = [(17, 17), (13, 17), (9, 17), (4, 5)]
    assert tuned.cost == pytest.approx(12 * sum(3 * q + k for q, k in queries_and_keys) / 17)
    assert state.cost == 1e9 + tuned.cost
    assert state.tuning["spent"] == tuned.cost


def test_a_batch_that_is_not_finite_is_paid_for_and_not_looked_at() -> None:
    method = make_method("moco")
    grid = Adaptive(sub_batches=3, evidence=0.0).fitted(32, 8)
    tuner = tuner_for(grid, method, unit=Unit.cost, batch_size=12, processes=1, seed=0)
    state, crops = TrainState(cost=1e9), make_crops(method, 0)
    crops.views[0][0, 0, 0, 0] = torch.nan
    assert not tuner.tune(crops, plan_of(method, 0), state).moved
    assert state.tuning["spent"] > 0
    assert state.tuning["evidence"] == {}
    json.dumps(state.tuning, allow_nan=False)


def test_measuring_compiles_nothing_and_every_cell_is_compiled_before(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr("pipeline.models.vit.CompiledBlocks", lambda: CompiledBlocks("aot_eager"))
    method = make_method("moco", compiled=True)
    blocks = method.encoder.run_block
    assert isinstance(blocks, CompiledBlocks)
    grid = Adaptive(dropouts=[0.0, 0.5], sub_batches=3).fitted(32, 8)
    tuner = tuner_for(grid, method, unit=Unit.cost, batch_size=12, processes=1, seed=0)
    engine = Engine(method, EngineConfig(Precision.fp32), OptimConfig(), local_batch=12, device=CPU)
    plan = plan_of(method, 0)
    prewarm(method, tuner.reachable(plan), 12, CPU)
    graphs = blocks.graphs
    assert graphs > 4
    for step, cell in enumerate(grid.grid()):
        state, crops = TrainState(cost=1e9, tuning={"cell": [*cell]}), make_crops(method, step)
        present = tuner.plan(plan, state)
        assert tuner.tune(crops, present, state).cost > 0
        engine.step(crops, present)
    assert (blocks.graphs, blocks.recompiles) == (graphs, 0)
    torch._dynamo.reset()


RANKS = """
import json, sys, torch
sys.path.insert(0, TESTS)
from test_tuning import *

world = distributed.start()
for name, precision in (("moco", Precision.bf16), ("simclr", Precision.fp32), ("dino", Precision.fp32)):
    traces = []
    for measuring in (False, True):
        method = make_method(name)
        grid = Adaptive(sub_batches=3, evidence=0.0).fitted(32, 8)
        tuner = tuner_for(grid, method, unit=Unit.cost, batch_size=12, processes=world.size, seed=0)
        engine = Engine(method, EngineConfig(precision), OptimConfig(), local_batch=12 // world.size, device=CPU)
        state, cells = TrainState(cost=1e9), [[*grid.start]]
        for step in range(4):
            plan, crops = plan_of(method, step), make_crops(method, step)
            mine = slice(world.rank, None, world.size)
            crops = Crops(tuple(view[mine] for view in crops.views), crops.index[mine])
            if measuring:
                tuner.tune(crops, plan, state)
                cells.append(state.tuning["cell"])
            engine.step(crops, plan)
        traces.append(trace(engine))
    assert not [n for n in traces[0] if not torch.equal(traces[0][n], traces[1][n])]
    print("tuned", json.dumps([cells, state.tuning]))
"""


def test_two_processes_leave_no_trace_and_decide_alike(run_ranks: Callable[..., list[str]]) -> None:
    tests = __file__.rpartition("/")[0]
    outputs = run_ranks(f"TESTS = {tests!r}\n{RANKS}", 2)
    said = [[line for line in out.splitlines() if line.startswith("tuned")] for out in outputs]
    assert said[0] == said[1]
    assert len(said[0]) == 3
    for line in said[0]:
        cells, tuning = json.loads(line.removeprefix("tuned"))
        assert len({str(cell) for cell in cells}) > 1, "no move, no test"
        assert tuning["spent"] > 0
