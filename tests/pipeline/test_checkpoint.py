"""Publication, damage, identity."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
import torch

from pipeline import distributed
from pipeline.checkpoint import CheckpointConfig, Checkpointer, TrainState
from pipeline.checkpoint_files import (
    checkpoints,
    describe,
    find_damage,
    newest_valid,
    progress_of,
    publish,
    seal,
    step_of,
)
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
def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_used(
    saved: Path, damage: str, make_moco: Callable[..., MoCo], caplog: pytest.LogCaptureFixture
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
    # Who only looks leaves it where it is.
    assert newest_valid(saved) == saved / "step_00000002"
    assert newest.exists()
    state = checkpointer(saved).restore(engine_for(make_moco()))
    assert state is not None
    assert state.step == 2
    assert "step_00000003 is damaged" in caplog.text
    assert [p.name for p in saved.glob("damaged-*")] == ["damaged-step_00000003"]
    assert not newest.exists()


def test_damaged_ones_stay_aside_and_do_not_come_back(
    saved: Path, make_moco: Callable[..., MoCo], make_batch: Callable[..., object]
) -> None:
    (saved / ".tmp-step_00000009").mkdir()
    for _ in range(2):
        (saved / "step_00000003" / "MANIFEST.json").unlink()
        engine, keeper = engine_for(make_moco()), checkpointer(saved)
        state = keeper.restore(engine)
        assert state is not None
        assert state.step == 2
        save(keeper, engine, TrainState(3), 0.3)
        assert find_damage(saved / "step_00000003") is None
        assert (saved / "latest").read_text() == "step_00000003"
    assert sorted(p.name for p in saved.glob("damaged-*")) == ["damaged-step_00000003", "damaged-step_00000003-2"]
    assert not list(saved.glob(".tmp*"))


def test_a_step_that_is_saved_again_replaces_what_was_there(saved: Path, make_moco: Callable[..., MoCo]) -> None:
    engine, keeper = engine_for(make_moco()), checkpointer(saved)
    keeper.restore(engine)
    save(keeper, engine, TrainState(3, samples=99), 0.3)
    assert json.loads((saved / "step_00000003" / "state.json").read_text())["state"]["samples"] == 99
    assert find_damage(saved / "step_00000003") is None
    assert not list(saved.glob(".tmp*"))


def test_training_goes_on_while_a_save_is_written(
    tmp_path: Path, make_moco: Callable[..., MoCo], make_batch: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Event()
    monkeypatch.setattr("pipeline.checkpoint.seal", lambda path: (gate.wait(), seal(path)))
    engine, keeper = engine_for(make_moco()), checkpointer(tmp_path)
    engine.step(make_batch(), plan(0))
    expected = {name: tensor.clone() for name, tensor in engine.method.state_dict().items()}
    assert "checkpoint_stall_seconds" in keeper.save(engine, TrainState(1), 0.1)
    engine.step(make_batch(start=8), plan(0))
    assert keeper.pending() == (True, False)
    assert keeper.settle(*keeper.pending()) == {}
    assert checkpoints(tmp_path) == []
    gate.set()
    assert keeper.finish()["checkpoints_total"] == 1
    # What was saved is the state at the call, not of the step that came in between.
    other = engine_for(make_moco())
    checkpointer(tmp_path).restore(other)
    assert all(torch.equal(other.method.state_dict()[name], expected[name]) for name in expected)


def test_without_room_a_save_fails_before_it_begins_and_training_goes_on(
    saved: Path, make_moco: Callable[..., MoCo], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, keeper = engine_for(make_moco()), checkpointer(saved)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10_000))
    assert save(keeper, engine, TrainState(4), 0.4) == {"checkpoint_failures_total": 1}
    assert "step_00000004 could not be saved: it takes" in caplog.text
    assert "make room, or keep fewer (checkpoint.keep_last)" in keeper.failure
    assert [p.name for p in checkpoints(saved)] == ["step_00000002", "step_00000003"]
    monkeypatch.undo()
    assert save(keeper, engine, TrainState(5), 0.5)["checkpoints_total"] == 1
    assert keeper.failure == ""


@pytest.mark.parametrize("where", ["pipeline.pieces.write", "pipeline.checkpoint.publish"])
def test_a_save_that_fails_on_its_way_costs_itself_only(
    saved: Path, make_moco: Callable[..., MoCo], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    engine, keeper = engine_for(make_moco()), checkpointer(saved)
    monkeypatch.setattr(where, fail)
    assert save(keeper, engine, TrainState(4), 0.4)["checkpoint_failures_total"] == 1
    assert "No space left on device" in keeper.failure
    assert newest_valid(saved) == saved / "step_00000003"
    monkeypatch.undo()
    save(keeper, engine, TrainState(5), 0.5)
    assert newest_valid(saved) == saved / "step_00000005"
    assert not list(saved.glob(".tmp*"))


def test_nothing_is_published_of_which_a_part_is_not_to_be_seen(saved: Path) -> None:
    temporary = saved / ".tmp-step_00000004"
    temporary.mkdir()
    (temporary / "rank_00000.safetensors").write_bytes(b"one of two")
    seal(temporary / "rank_00000.safetensors")
    names = ["rank_00000.safetensors", "rank_00001.safetensors"]
    with pytest.raises(FileNotFoundError, match="rank_00001"):
        publish(saved / "step_00000004", names, {})
    assert not (saved / "step_00000004").exists()


def test_what_users_put_beside_the_checkpoints_stays(saved: Path, make_moco: Callable[..., MoCo]) -> None:
    (saved / "step_00000002-mine").mkdir()
    (saved / "step_00000002" / ".nfs0001").touch()
    engine, keeper = engine_for(make_moco()), checkpointer(saved, keep_last=1, every_steps=2, keep_every_steps=2)
    keeper.restore(engine)
    assert save(keeper, engine, TrainState(5), 0.5)["checkpoints_total"] == 1
    assert sorted(p.name for p in saved.glob("step_*")) == ["step_00000002", "step_00000002-mine", "step_00000005"]
    assert find_damage(saved / "step_00000002") is None


def test_a_disk_that_does_not_answer_is_no_damage(
    saved: Path, make_moco: Callable[..., MoCo], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pipeline.checkpoint_files.describe", fail)
    with pytest.raises(ValueError, match=r"step_00000003 cannot be read .* mend the file system, then try again"):
        checkpointer(saved).restore(engine_for(make_moco()))
    assert not list(saved.glob("damaged-*"))


def test_the_best_and_every_so_many_are_kept_for_good(tmp_path: Path, make_moco: Callable[..., MoCo]) -> None:
    keeper = checkpointer(tmp_path, keep_last=1, keep_best=True, every_steps=2, keep_every_steps=4)
    engine = engine_for(make_moco())
    for step, score in [(1, 0.2), (2, None), (3, 0.5), (4, None), (5, 0.4), (6, None), (7, None)]:
        keeper.save(engine, TrainState(step), step / 10, score)
        keeper.finish()
    assert [step_of(c) for c in checkpoints(tmp_path)] == [3, 4, 7]


def test_every_tensor_of_a_run_is_in_the_inventory(make_moco: Callable[..., MoCo], tmp_path: Path) -> None:
    """Whatever a training step can reach is saved, or is a function of the configuration."""
    engine = engine_for(make_moco())
    engine.step(Views(), plan(0))
    known = {t.data_ptr() for piece in engine.state() for t in (piece.data,)}
    known |= {t.data_ptr() for t in (*engine.method.parameters(), *engine.method.buffers())}
    reachable = dict(tensors_of(engine.method, "method"))
    lost = [path for path, tensor in reachable.items() if tensor.numel() and tensor.data_ptr() not in known]
    # Fixed sine-cosine positions are no parameter: the place of learned ones is empty. Gradients are of one step.
    assert [path for path in lost if not path.endswith(".grad")] == []
    assert len(reachable) > 100


def tensors_of(thing: object, path: str, seen: set[int] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor that can be reached from an object, with the way there."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield path, thing
    elif isinstance(thing, dict):
        for key, value in thing.items():
            yield from tensors_of(value, f"{path}[{key}]", seen)
    elif isinstance(thing, list | tuple | set):
        for i, value in enumerate(thing):
            yield from tensors_of(value, f"{path}[{i}]", seen)
    elif type(thing).__module__.startswith(("pipeline", "torch.nn", "timm")) and hasattr(thing, "__dict__"):
        for key, value in vars(thing).items():
            yield from tensors_of(value, f"{path}.{key}", seen)


class Views:
    """A batch of two views."""

    views = tuple(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(2))
    index = torch.arange(8)


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
        ({"keep_every_steps": 1500}, r"keep_every_steps must be a multiple of checkpoint\.every_steps=1000, got 1500"),
    ],
)
def test_bad_values_are_refused(arguments: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        CheckpointConfig(**arguments)  # type: ignore[arg-type]
