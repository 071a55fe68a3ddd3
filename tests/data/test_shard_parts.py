"""Several processes that share a sharding, as they would on several nodes."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data import ledger as ledger_module
from data.deal import Part
from data.ledger import LEDGER_NAME, Ledger
from data.locks import HERE
from data.manifest import MANIFEST_NAME
from data.rejected import REJECTED_NAME
from data.shard import ShardConfig, run

ROOT = Path(__file__).parents[2]
OPTIONS = {"samples_per_shard": 3, "max_rejected": 2}  # 17 shards
PLAN = {"seed": 0, "source_fingerprint": "12"}
# Waits after every image, so that it can be met in the middle of a shard.
COMMAND = """
import sys, time
from data import pack, shard

real, pause = pack.as_jpeg, float(sys.argv[4])

def slow(*given):
    time.sleep(pause)
    return real(*given)

pack.as_jpeg = slow
shard.run(shard.ShardConfig(sys.argv[1], sys.argv[2], part=sys.argv[3], workers=1, samples_per_shard=3, max_rejected=2))
"""


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def images(drawn_folder, tmp_path_factory) -> Path:
    """Return the drawn folder with two files that are no images."""
    folder = Path(shutil.copytree(drawn_folder, tmp_path_factory.mktemp("parts") / "images"))
    (folder / "disc" / "broken.jpg").write_bytes(b"no image")
    (folder / "ring" / "empty.jpg").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def whole(images) -> dict[str, bytes]:
    """Return what one process writes."""
    output = images.parent / "whole"
    run(ShardConfig(str(images), str(output), workers=1, **OPTIONS))
    assert {MANIFEST_NAME, REJECTED_NAME, "train-000016.idx"} <= content(output).keys()
    return content(output)


def start(images: Path, output: Path, parts: int, pause: float = 0.0) -> list[subprocess.Popen]:
    """Start a process for every part, at once."""
    commands = [[sys.executable, "-c", COMMAND, images, output, f"{n + 1}/{parts}", str(pause)] for n in range(parts)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]


def ends(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Return exit code and output of each."""
    return [(process.communicate(timeout=60)[0], process.returncode)[::-1] for process in processes]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_at_once_write_what_one_process_writes(images, whole, tmp_path, parts):
    ended = ends(start(images, tmp_path / "out", parts))
    assert [code for code, _ in ended] == [0] * parts, ended
    # The last to finish tells of the set, the others that they are not the last.
    assert sum(bool(re.search(r"\nshards +17\n", said)) for _, said in ended) == 1
    assert sum("; the last to finish writes manifest.json" in said for _, said in ended) == parts - 1
    assert content(tmp_path / "out") == whole


@pytest.mark.parametrize(("killed", "resumed"), [([0], 3), ([1], 1), ([0, 1], 3), ([0, 1], 2)])
def test_parts_killed_anywhere_are_finished_by_any_number_of_parts(images, whole, tmp_path, killed, resumed):
    output = tmp_path / "out"
    processes = start(images, output, 2, pause=0.05)
    wait_until(lambda: len(list(output.glob("*.tar"))) >= 4)
    # In the middle of a shard.
    for victim in killed:
        wait_until(lambda victim=victim: any(output.glob(f"*.tar.{processes[victim].pid}-*.tmp")))
        processes[victim].kill()
    for number, (code, said) in enumerate(ends(processes)):
        # Who is left finishes its own part, and does not wait for the others.
        assert code == (-signal.SIGKILL if number in killed else 0), said
    assert not (output / MANIFEST_NAME).exists()
    tars = [int(path.stem[-6:]) for path in output.glob("*.tar")]
    assert 4 <= len(tars) < 17
    assert any(number % 2 in killed for number in set(range(17)) - set(tars))
    ended = ends(start(images, output, resumed))
    assert [code for code, _ in ended] == [0] * resumed, ended
    assert content(output) == whole


def shard(images: Path, output: Path, part: str, **options) -> None:
    run(ShardConfig(str(images), str(output), part=part, workers=1, **OPTIONS | options))


def test_more_parts_than_shards(images, whole, tmp_path):
    for number in reversed(range(1, 21)):
        assert not (tmp_path / "out" / MANIFEST_NAME).exists()
        shard(images, tmp_path / "out", f"{number}/20")
    assert content(tmp_path / "out") == whole


def test_rejected_images_of_all_parts_count(images, whole, tmp_path):
    # Of the two, each part has one, and one may be: together they are too many.
    output, options = tmp_path / "out", {"max_rejected": 1, "seed": 1}
    shard(images, output, "1/2", **options)
    [first] = rejecting(output)
    with pytest.raises(ValueError, match=r"^shard\.max_rejected: 2 images are rejected, 1 may be"):
        shard(images, output, "2/2", **options)
    [second] = rejecting(output) - {first}
    assert {first % 2, second % 2} == {0, 1}
    assert not (output / MANIFEST_NAME).exists()
    shard(images, output, "2/2", **options | {"max_rejected": 2})
    assert content(output)[REJECTED_NAME] == whole[REJECTED_NAME]
    assert (output / MANIFEST_NAME).exists()


def rejecting(output: Path) -> set[int]:
    """Return the numbers of the shards whose records name rejected images."""
    records = (output / LEDGER_NAME).glob("*.record")
    return {int(path.name[-17:-11]) for path in records if b'"rejected": []' not in path.read_bytes()}


def test_parts_that_see_other_images_are_refused(images, tmp_path):
    changing = Path(shutil.copytree(images, tmp_path / "images"))
    shard(changing, tmp_path / "out", "1/2")
    (changing / "disc" / "late.jpg").write_bytes((changing / "disc" / "000000.jpg").read_bytes())
    with pytest.raises(ValueError, match=r"source_fingerprint: not the .* that part 2 of 2 sees\); give all parts the"):
        shard(changing, tmp_path / "out", "2/2")
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()


def test_a_shard_lost_before_the_last_part_is_no_manifest(images, whole, tmp_path):
    output = tmp_path / "out"
    shard(images, output, "1/2")
    (output / "train-000002.tar").unlink()
    with pytest.raises(ValueError, match=r"out has lost train-000002\.tar since .*the same command of all parts again"):
        shard(images, output, "2/2")
    assert not (output / MANIFEST_NAME).exists()
    (output / LEDGER_NAME / "train-000004.tar.record").unlink()
    with pytest.raises(ValueError, match="has lost the records of 1 shards"):
        shard(images, output, "2/2")
    shard(images, output, "1/2")
    assert content(output) == whole


def test_a_part_that_begins_anew_is_no_longer_finished(tmp_path):
    first, second = (Ledger(tmp_path, PLAN, Part(number, 2)) for number in (1, 2))
    with first, first.part_finished() as unfinished:
        assert unfinished == [2]
    with first, second:
        with second.part_finished() as unfinished:
            assert unfinished == [1]
        with first.part_finished() as unfinished:
            assert unfinished == []


def test_marks_of_another_division_or_plan_do_not_count(tmp_path):
    for part, plan in ((Part(2, 3), PLAN), (Part(2, 2), PLAN)):
        with Ledger(tmp_path, plan, part) as ledger, ledger.part_finished():
            pass
    (tmp_path / LEDGER_NAME / "plan").unlink()
    other = Ledger(tmp_path, PLAN | {"seed": 1}, Part(1, 2))
    with other, other.part_finished() as unfinished:
        assert unfinished == [2]


@pytest.mark.parametrize("other", [Part(1, 2), Part(), Part(2, 4), Part(1, 3)])
def test_who_would_write_the_same_shards_is_refused(tmp_path, other):
    refused = pytest.raises(ValueError, match=rf"another command is writing to {tmp_path}, on {HERE}; wait for it")
    with Ledger(tmp_path, PLAN, Part(1, 2)), Ledger(tmp_path, PLAN, Part(2, 2)), refused:
        Ledger(tmp_path, PLAN, other).__enter__()
    with Ledger(tmp_path, PLAN, other):
        pass


def test_the_holder_on_another_node_may_be_gone_with_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ledger_module, "HERE", "another.node")
    monkeypatch.setattr(ledger_module, "_LEASE", 0.5)
    gone, next_one = Ledger(tmp_path, PLAN), Ledger(tmp_path, PLAN)
    with gone, pytest.raises(ValueError, match=f"another command is writing to {tmp_path}, on {HERE}"):
        next_one.__enter__()
    assert capsys.readouterr().out == f"{tmp_path} is locked on {HERE}; waiting 0 s, in case that is lost\n"
    gone.__enter__()
    threading.Timer(0.3, gone.__exit__, (None, None, None)).start()
    with next_one:
        pass


def test_what_other_parts_are_writing_stays(tmp_path):
    names = {f"train-00000{number}.{kind}.7-ab.tmp" for number in range(4) for kind in ("tar", "idx", "tar.record")}
    (tmp_path / LEDGER_NAME).mkdir()
    for name in names:
        (tmp_path / name).touch()
        (tmp_path / LEDGER_NAME / name).touch()
    with Ledger(tmp_path, PLAN, Part(2, 3)):
        left = {name for name in names if name[11] != "1"}
        assert {path.name for path in tmp_path.glob("*.tmp")} == left
        assert {path.name for path in (tmp_path / LEDGER_NAME).glob("*.tmp")} == left


def test_one_part_mends_a_finished_set(images, whole, tmp_path, capsys):
    output = tmp_path / "out"
    for number in (1, 2):
        shard(images, output, f"{number}/2")
    victims = ["train-000001.tar", REJECTED_NAME]
    for name in victims:
        (output / name).unlink()
    shard(images, output, "2/2")
    assert "lacks train-000001.tar, rejected.csv; part 1 writes that again" in capsys.readouterr().out
    assert not (output / victims[0]).exists()
    assert (output / LEDGER_NAME).exists()  # part 1 may be at work in it
    shard(images, output, "1/2")
    assert content(output) == whole
    (output / LEDGER_NAME).mkdir()  # of a part 1 that mends, its last file being there
    shard(images, output, "2/2")
    assert (output / LEDGER_NAME).exists()
    shard(images, output, "1/2")
    assert content(output) == whole


def test_parts_may_start_together_in_a_folder_that_is_not_there(tmp_path):
    for attempt in range(20):
        ledgers = [Ledger(tmp_path / str(attempt), PLAN, Part(number, 4)) for number in range(1, 5)]
        barrier, entered = threading.Barrier(4), []

        def enter(ledger, barrier=barrier, entered=entered):
            barrier.wait()
            with ledger:
                entered.append(ledger.part.number)
                barrier.wait()

        threads = [threading.Thread(target=enter, args=(ledger,)) for ledger in ledgers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sorted(entered) == [1, 2, 3, 4]
