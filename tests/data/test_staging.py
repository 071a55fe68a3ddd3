"""Staging copies what comes next, stays within its bounds, deletes only its own, and decides nothing."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import staging
from data.order import ShuffledOrder
from data.staging import Need, Originals, Stage, needs

SIZE = 1000


@pytest.fixture
def originals(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "far"
    folder.mkdir()
    paths = [folder / f"train-{k:06d}.tar" for k in range(6)]
    for k, path in enumerate(paths):
        path.write_bytes(bytes([k]) * SIZE)
    return paths


@pytest.fixture
def stage(originals: list[Path], tmp_path: Path) -> Iterator[Callable[..., Stage]]:
    opened: list[Stage] = []

    def open_stage(limit: int = 3 * SIZE) -> Stage:
        opened.append(Stage(tmp_path / "near", limit, originals, [SIZE] * len(originals)))
        return opened[-1]

    yield open_stage
    for each in opened:
        each.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


def in_turn(shards: list[int], each: int = 10) -> Iterator[Need]:
    return (Need(shard, k * each, (k + 1) * each - 1) for k, shard in enumerate(shards))


def staged(stage: Stage) -> list[str]:
    return sorted(path.name for path in stage.folder.glob("*.tar"))


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=20),
    start=st.integers(0, 150),
    ranks=st.integers(1, 4),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_needs_are_the_shards_of_the_ranks_places(counts: list[int], start: int, ranks: int, seed: int) -> None:
    order = ShuffledOrder(counts, seed)
    epochs = -(-(start + 1) // sum(counts)) + 1
    places = np.arange(start, epochs * sum(counts))
    shards = np.repeat(np.arange(len(counts)), counts)[order.place(places)[1]]
    for rank in range(ranks):
        mine = (places - start) % ranks == rank
        expected: list[tuple[int, int, int]] = []
        for epoch in range(start // sum(counts), epochs):
            here = mine & (places // sum(counts) == epoch)
            parts = shards * order.lanes + places % sum(counts) % order.lanes
            spans = {int(part): places[here & (parts == part)] for part in np.unique(parts[here])}
            found_here = ((part // order.lanes, int(p[0]), int(p[-1])) for part, p in spans.items())
            expected += sorted(found_here, key=lambda span: span[1])
        found = [(n.shard, n.first, n.last) for n in islice(needs(order, start, rank, ranks), len(expected))]
        assert found == expected


def test_copies_are_made_ahead_within_the_limit_and_go_behind(
    stage: Callable[..., Stage], originals: list[Path]
) -> None:
    near = stage()
    near.follow(in_turn([4, 2, 0, 1, 3]), horizon=100)
    until(lambda: len(near._copies) == 3)
    assert staged(near) == [originals[k].name for k in (0, 2, 4)]
    assert near.path(4).read_bytes() == originals[4].read_bytes()
    assert near.path(4).parent == near.folder
    assert near.path(1) == originals[1]
    near.advance(10)  # shard 4 was read up to place 9
    until(lambda: 1 in near._copies)
    assert staged(near) == [originals[k].name for k in (0, 1, 2)]
    near.advance(50)
    until(lambda: near._used == 0)
    assert staged(near) == []
    assert all(path.exists() for path in originals)


def test_a_shard_that_is_needed_again_stays(stage: Callable[..., Stage]) -> None:
    near = stage()
    near.follow(iter([Need(0, 0, 9), Need(1, 5, 30), Need(0, 20, 40)]), horizon=100)
    until(lambda: near._last_use.get(0) == 40)
    near.advance(15)
    assert set(near._copies) == {0, 1}
    near.advance(35)
    assert set(near._copies) == {0}


def test_endless_needs_are_met_one_horizon_ahead_and_no_further(stage: Callable[..., Stage]) -> None:
    """A set that fits whole: the thread rests until the run comes near, and ends when it is told to."""
    near, asked = stage(limit=10 * SIZE), []

    def epochs() -> Iterator[Need]:
        for place in count(0, 10):
            asked.append(place)
            yield Need(place // 10 % 6, place, place + 9)

    near.follow(epochs(), horizon=60)
    until(lambda: len(near._copies) == 6)
    until(lambda: asked[-1] == 60)
    near.advance(25)
    until(lambda: asked[-1] == 90)
    near.close()
    assert asked[-1] == 90


def test_a_limit_below_the_largest_shard_is_refused(stage: Callable[..., Stage]) -> None:
    with pytest.raises(ValueError, match=r"data\.staging_gigabytes: this process's part is 9\.99e-07, less than the"):
        stage(limit=SIZE - 1)


def test_a_copy_that_goes_is_forgotten_once_nobody_can_open_it(stage: Callable[..., Stage]) -> None:
    near, forgotten = stage(), []
    near.on_eviction(lambda path: forgotten.append((path.name, path.exists())))
    near.follow(in_turn([0, 1]), horizon=100)
    until(lambda: len(near._copies) == 2)
    near.advance(10)
    assert forgotten == [("train-000000.tar", False)]


def test_a_full_disk_stops_the_copies_and_not_the_run(
    stage: Callable[..., Stage],
    originals: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:

    near = stage(limit=5 * SIZE)
    copy_file = near._copy_file

    def full_after_two(source: Path, target: Path) -> int | None:
        if len(near._copies) == 2:
            target.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return copy_file(source, target)

    monkeypatch.setattr(near, "_copy_file", full_after_two)
    near.follow(in_turn([0, 1, 2, 3]), horizon=100)
    until(lambda: bool(caplog.messages))
    assert "No space left on device" in caplog.messages[0]
    assert near._limit == 2 * SIZE
    assert not list(near.folder.glob("*.tmp"))
    assert near.path(2) == originals[2]
    monkeypatch.setattr(near, "_copy_file", copy_file)
    near.advance(10)  # one copy goes, so one may come
    until(lambda: 3 in near._copies)
    assert len(caplog.messages) == 1


def test_another_error_costs_one_copy_only(
    stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    near = stage()
    copy_file = near._copy_file

    def stale_at_first(source: Path, target: Path) -> int | None:
        if source.name == "train-000000.tar":
            raise OSError(errno.ESTALE, "Stale file handle")
        return copy_file(source, target)

    monkeypatch.setattr(near, "_copy_file", stale_at_first)
    near.follow(in_turn([0, 1, 2]), horizon=100)
    until(lambda: len(near._copies) == 2)
    assert near._limit == 3 * SIZE
    assert "Stale file handle" in caplog.messages[0]


def test_a_disk_that_refuses_to_delete_ends_nothing(
    stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    near = stage()
    near.follow(in_turn([0]), horizon=100)
    until(lambda: 0 in near._copies)

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        near.advance(10)
    assert near._used == 0
    assert "Read-only file system" in caplog.messages[0]


def test_leaving_does_not_wait_for_the_rest_of_a_copy(
    stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    near = stage()
    monkeypatch.setattr(staging, "_PIECE", 1)
    write = Path.open

    def slowly(path: Path, mode: str = "r") -> object:
        if mode == "rb":
            time.sleep(0.2)
            near._stopping = True
        return write(path, mode)

    monkeypatch.setattr(Path, "open", slowly)
    near.follow(in_turn([0]), horizon=100)
    until(lambda: near._thread is not None and not near._thread.is_alive())
    assert near._copies == {}
    assert near._used == 0
    assert [path.name for path in near.folder.iterdir()] == ["owner.lock"]


def test_a_copy_that_comes_too_late_goes_at_once(stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch) -> None:
    near = stage()
    copy_file = near._copy_file

    def slowly(source: Path, target: Path) -> int | None:
        copied = copy_file(source, target)
        near.advance(10)
        return copied

    monkeypatch.setattr(near, "_copy_file", slowly)
    near.follow(in_turn([0]), horizon=100)
    until(lambda: near._thread is not None and not near._thread.is_alive())
    assert staged(near) == []
    assert near._used == 0


def test_an_original_of_another_size_is_not_taken(
    stage: Callable[..., Stage], originals: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    originals[0].write_bytes(b"cut")
    near = stage()
    near.follow(in_turn([0]), horizon=100)
    until(lambda: bool(caplog.messages))
    assert near.path(0) == originals[0]


def test_closing_removes_what_it_wrote_and_nothing_else(stage: Callable[..., Stage], tmp_path: Path) -> None:
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "mine.tar").write_bytes(b"precious")
    near = stage()
    near.follow(in_turn([0, 1]), horizon=100)
    until(lambda: len(near._copies) == 2)
    (near.folder / "notes.txt").write_text("somebody's")
    near.close()
    assert (near.folder / "notes.txt").exists()
    assert sorted(path.name for path in near.folder.iterdir()) == ["notes.txt"]
    assert (tmp_path / "near" / "mine.tar").read_bytes() == b"precious"


def test_the_copies_of_a_killed_process_go_and_those_of_a_living_one_stay(
    stage: Callable[..., Stage], originals: list[Path], tmp_path: Path
) -> None:
    program = (
        "import sys, time; from pathlib import Path; from data.staging import Need, Stage\n"
        "paths = [Path(each) for each in sys.argv[2:]]\n"
        "stage = Stage(Path(sys.argv[1]), 10**6, paths, [1000] * len(paths))\n"
        "stage.follow(iter([Need(0, 0, 9)]), horizon=100)\n"
        "while 0 not in stage._copies: time.sleep(0.01)\n"
        "print(stage.folder, flush=True); time.sleep(600)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "near"), *map(str, originals)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        folder = Path(other.stdout.readline().strip())
        stage()
        assert (folder / originals[0].name).exists()
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    stage()
    assert not folder.exists()


def test_a_folder_that_cannot_be_written_to_is_refused(originals: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data.staging: cannot write to .*/file/x \(Not a directory\); choose"):
        Stage(tmp_path / "file" / "x", SIZE, originals, [SIZE] * 6)


def test_without_staging_shards_are_read_where_they_lie(originals: list[Path]) -> None:
    stage = Originals(originals)
    stage.follow(in_turn([0]), horizon=100)
    stage.advance(3)
    assert stage.path(0) == originals[0]
    stage.close()
