import fcntl
import os
import shutil
import stat
from pathlib import Path

import pytest

from data.ledger import LEDGER_NAME, Ledger
from data.manifest import Shard
from data.pack import PackedShard

PLAN = {"seed": 0, "source_fingerprint": "12"}
NAME = "train-000000.tar"
PACKED = PackedShard(Shard(NAME, 2, 3, "a", "b"), [("x.jpg", "empty file")], {"kept": 2}, 4, 5)


@pytest.fixture
def interrupted(tmp_path) -> Path:
    """Return an output with the record of one shard."""
    with Ledger(tmp_path, PLAN) as ledger:
        ledger.record(PACKED)
    return tmp_path


def test_a_record_comes_back_as_it_was(interrupted):
    with Ledger(interrupted, PLAN) as ledger:
        assert ledger.recall(NAME) == PACKED
        assert ledger.recall("train-000001.tar") is None


@pytest.mark.parametrize("damage", [b"", b"{}", b"null", b"[]", b"\xff", b"{}\n{}"])
def test_a_damaged_record_is_none(interrupted, damage):
    (interrupted / LEDGER_NAME / f"{NAME}.record").write_bytes(damage)
    with Ledger(interrupted, PLAN) as ledger:
        assert ledger.recall(NAME) is None


def test_every_changed_byte_of_a_record_makes_it_none(interrupted):
    path = interrupted / LEDGER_NAME / f"{NAME}.record"
    content = path.read_bytes()
    with Ledger(interrupted, PLAN) as ledger:
        for at in range(len(content)):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            assert ledger.recall(NAME) is None
        path.write_bytes(content)
        assert ledger.recall(NAME) == PACKED


@pytest.mark.parametrize("damage", [b"", b"{}", b"null", None])
def test_without_its_plan_only_what_is_of_the_same_plan_is_kept(interrupted, damage):
    plan = interrupted / LEDGER_NAME / "plan"
    for asked, kept in ((PLAN | {"seed": 1}, None), (PLAN, PACKED)):
        plan.unlink() if damage is None else plan.write_bytes(damage)
        with Ledger(interrupted, asked) as ledger:
            assert ledger.recall(NAME) == kept


def test_half_written_files_of_killed_processes_are_removed(interrupted):
    for folder in (interrupted, interrupted / LEDGER_NAME):
        (folder / f"{NAME}.123.tmp").write_bytes(b"half")
    with Ledger(interrupted, PLAN):
        assert not list(interrupted.rglob("*.tmp"))
        (interrupted / f"{NAME}.124.tmp").write_bytes(b"half")
    assert not list(interrupted.rglob("*.tmp"))


def test_another_source_is_explained(interrupted):
    with pytest.raises(ValueError, match=r"\(source_fingerprint: not the names, labels, sizes and times of the source"):
        Ledger(interrupted, PLAN | {"source_fingerprint": "13"}).__enter__()


def test_the_lock_of_a_folder_that_is_gone_is_none(tmp_path, monkeypatch):
    """A command opens the ledger of another, which then finishes and removes it: that lock keeps nobody out."""
    real, opened = os.open, []

    def open_and_finish(path, *given):
        descriptor = real(path, *given)
        if not opened:
            opened.append(path)
            os.unlink(path)
            os.rmdir(path.parent)
        return descriptor

    monkeypatch.setattr(os, "open", open_and_finish)
    first, second = Ledger(tmp_path, PLAN), Ledger(tmp_path, PLAN)
    with first:
        assert opened == [tmp_path / LEDGER_NAME / "lock"]
        with pytest.raises(ValueError, match="another command is writing"):
            second.__enter__()


def test_locks_are_of_files_open_for_writing(tmp_path, monkeypatch):
    """NFS and Lustre keep the locks of folders to one node; NFS refuses those of files that are open for reading."""
    real, seen = fcntl.flock, []

    def flock(descriptor, operation):
        seen.append((stat.S_ISREG(os.fstat(descriptor).st_mode), fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_RDWR))
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with Ledger(tmp_path, PLAN) as ledger, ledger.part_finished():
        pass
    assert len(seen) == 3
    assert set(seen) == {(True, os.O_RDWR)}


def test_nothing_is_open_in_a_folder_that_is_removed(tmp_path, monkeypatch):
    """Of an open file that is removed NFS leaves another one in its folder, which then cannot be removed."""
    real, left = shutil.rmtree, []

    def remove(folder, **options):
        links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        left.extend(path for path in map(os.path.realpath, links) if path.startswith(str(folder)))
        real(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", remove)
    with Ledger(tmp_path, PLAN) as ledger:
        ledger.discard()
    assert left == []
    assert not list(tmp_path.iterdir())
