"""Publication, damage, identity."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline import distributed
from pipeline.checkpoint import CheckpointConfig, Checkpointer, TrainState
from pipeline.checkpoint_files import checkpoints, describe, find_damage, newest_valid, progress_of
from pipeline.engine import Engine
from pipeline.engine_config import EngineConfig, Precision
from pipeline.methods.moco import MoCo
from pipeline.optim import OptimConfig
from pipeline.schedules import StepPlan

IDENTITY = {"seed": 0, "batch_size": 8}


@pytest.fixture(autouse=True)
def process_group() -> None:
    distributed.start()


def engine_for(method: MoCo, precision: Precision = Precision.fp32) -> Engine:
    config = EngineConfig(precision)
    return Engine(method, config, OptimConfig(), local_batch=8, device=torch.device("cpu"))


def checkpointer(directory: Path, identity: dict[str, object] | None = None, **config: object) -> Checkpointer:
    return Checkpointer(directory, CheckpointConfig(**config), identity or IDENTITY)  # type: ignore[arg-type]


def save(keeper: Checkpointer, engine: Engine, state: TrainState, progress: float) -> dict[str, float]:
    """Save and wait until it is on the disk."""
    metrics = keeper.save(engine, state, progress)
    return metrics | keeper.finish()


def plan(step: int) -> StepPlan:
    """Freeze two layers from step 2 on."""
    return StepPlan(step / 10, 1e-3, 0.1, 0.9, (0.0, 0.0, 1e-3, 1e-3) if step > 1 else (1e-3,) * 4)


@pytest.fixture
def saved(tmp_path: Path, make_moco: Callable[..., MoCo], make_batch: Callable[..., object]) -> Path:
    """Three steps, each saved, the last two kept."""
    engine, keeper = engine_for(make_moco()), checkpointer(tmp_path, keep_last=2)
    state = TrainState()
    for step in range(3):
        engine.step(make_batch(start=8 * step), plan(step))
        state.advance(8, 1.5)
        save(keeper, engine, state, progress=(step + 1) / 3)
    return tmp_path


@pytest.mark.parametrize("precision", list(Precision))
def test_going_on_is_going_through_bit_for_bit(
    tmp_path: Path, make_moco: Callable[..., MoCo], make_batch: Callable[..., object], precision: Precision
) -> None:
    whole, keeper = engine_for(make_moco(), precision), checkpointer(tmp_path)
    for step in range(3):
        whole.step(make_batch(start=8 * step), plan(step))
    save(keeper, whole, TrainState(3), 0.3)
    resumed = engine_for(make_moco(), precision)
    assert keeper.restore(resumed) is not None
    for step in range(3, 6):
        losses = [engine.step(make_batch(start=8 * step), plan(step)).loss for engine in (whole, resumed)]
        assert torch.equal(*losses)
    for ours, theirs in (
        (whole.method.state_dict(), resumed.method.state_dict()),
        (whole.method.state(), resumed.method.state()),
    ):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_restore_gives_back_every_tensor(saved: Path, make_moco: Callable[..., MoCo]) -> None:
    torch.manual_seed(1)
    first, second = engine_for(make_moco()), engine_for(make_moco())
    for engine in (first, second):
        assert checkpointer(saved).restore(engine) == TrainState(3, 24, 36.0)
    for ours, theirs in (
        (first.method.state_dict(), second.method.state_dict()),
        (first.method.state(), second.method.state()),
    ):
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    moments = first._engine.optimizer.optimizer.state
    assert all(float(s["step"]) == 3 for s in moments.values())


def test_only_published_names_and_the_newest_are_kept(saved: Path) -> None:
    assert [p.name for p in checkpoints(saved)] == ["step_00000002", "step_00000003"]
    assert (saved / "latest").read_text() == "step_00000003"
    assert not list(saved.glob(".tmp*"))


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    saved: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest = saved / "step_00000003"
    victim = newest / ("MANIFEST.json" if damage == "manifest" else "rank_00000.safetensors")
    content = bytearray(victim.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    victim.write_bytes(content[: len(content) // 2] if damage in ("cut", "manifest") else content)
    if damage == "remove":
        victim.unlink()
    assert find_damage(newest) is not None
    assert newest_valid(saved) == saved / "step_00000002"
    assert "step_00000003 is damaged" in caplog.text


def test_a_new_checkpoint_replaces_damaged_later_ones(
    saved: Path, make_moco: Callable[..., MoCo], make_batch: Callable[..., object]
) -> None:
    (saved / "step_00000003" / "MANIFEST.json").unlink()
    (saved / ".tmp-step_00000009").mkdir()
    engine, keeper = engine_for(make_moco()), checkpointer(saved, keep_last=1)
    state = keeper.restore(engine)
    assert state is not None
    assert state.step == 2
    # Another life that saves earlier than the damaged one did.
    state.step, old = 2, saved / "step_00000002"
    save(keeper, engine, state, 0.3)
    assert [p.name for p in checkpoints(saved)] == ["step_00000002"]
    assert find_damage(old) is None
    assert (saved / "latest").read_text() == "step_00000002"
    assert not list(saved.glob(".tmp*"))


def test_a_run_does_not_silently_start_anew_when_every_checkpoint_is_damaged(saved: Path) -> None:
    for checkpoint in checkpoints(saved):
        (checkpoint / "MANIFEST.json").unlink()
    with pytest.raises(ValueError, match=r"none of its 2 checkpoints is whole; .* overwrite=true to start anew"):
        newest_valid(saved)


def test_half_written_checkpoints_are_not_found(saved: Path, tmp_path: Path) -> None:
    (saved / "step_00000003").rename(saved / ".tmp-step_00000003")
    assert newest_valid(saved) == saved / "step_00000002"
    assert newest_valid(tmp_path / "nowhere") is None


def test_another_run_is_refused(saved: Path, make_moco: Callable[..., MoCo]) -> None:
    engine = engine_for(make_moco())
    with pytest.raises(
        ValueError, match=r"batch_size must stay what it was when .* was saved \(8\), got 16; set it back"
    ):
        checkpointer(saved, {"seed": 0, "batch_size": 16}).restore(engine)


def test_a_hostile_pickle_is_not_run(
    saved: Path, make_moco: Callable[..., MoCo], capsys: pytest.CaptureFixture[str]
) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return print, ("this must never be printed",)

    victim = saved / "step_00000003" / "rank_00000.safetensors"
    torch.save({"module": Hostile()}, victim)
    listing = json.loads((victim.parent / "MANIFEST.json").read_text())
    listing[victim.name] = describe(victim)
    (victim.parent / "MANIFEST.json").write_text(json.dumps(listing))
    with pytest.raises(ValueError, match=r"rank_00000\.safetensors cannot be read .* take another checkpoint"):
        checkpointer(saved).restore(engine_for(make_moco()))
    assert "never" not in capsys.readouterr().out


def test_nothing_that_the_manifest_does_not_list_is_read(saved: Path) -> None:
    newest = saved / "step_00000003"
    (newest / "rank_00001.safetensors").write_bytes((newest / "rank_00000.safetensors").read_bytes())
    assert find_damage(newest) == "rank_00001.safetensors is not listed"


def test_due_by_steps_and_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    keeper = checkpointer(tmp_path, every_steps=10, every_minutes=1.0)
    assert [keeper.due(TrainState(step=s), 0.5) for s in (9, 10, 11, 20)] == [False, True, False, True]
    now[0] += 61
    assert keeper.due(TrainState(step=11), 0.5)


def test_milestones_are_saved_when_passed_and_kept_for_good(tmp_path: Path, make_moco: Callable[..., MoCo]) -> None:
    def keeper() -> Checkpointer:
        return checkpointer(tmp_path, keep_last=1, milestones=[0.25, 0.5, 1.0])

    engine, first = engine_for(make_moco()), keeper()
    saved = []
    for step in range(1, 7):
        if step == 4:
            # A new life knows from the checkpoint which milestones have passed.
            first = keeper()
            first.restore(engine)
        if first.due(TrainState(step), step / 10):
            save(first, engine, TrainState(step), step / 10)
            saved.append(step)
    assert saved == [3, 5]
    save(first, engine, TrainState(9), 0.9)
    save(first, engine, TrainState(10), 1.0)
    assert [progress_of(c) for c in checkpoints(tmp_path)] == [0.3, 0.5, 1.0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"milestones": [0.5, 1.5]},
            r"checkpoint\.milestones must be shares of the budget in \(0, 1\], got \[0\.5, 1\.5\]",
        ),
        ({"every_steps": 0}, r"checkpoint\.every_steps and checkpoint\.every_minutes must be above 0, got 0 and 15"),
        ({"keep_last": 0}, r"checkpoint\.keep_last must be at least 1, got 0"),
    ],
)
def test_bad_values_are_refused(arguments: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        CheckpointConfig(**arguments)  # type: ignore[arg-type]
