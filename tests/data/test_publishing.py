import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data.publishing import publish, remove_temporaries, temporary_path, write_atomically


def test_file_and_folder_are_synced_and_in_this_order(tmp_path, monkeypatch):
    real, steps = {name: getattr(os, name) for name in ("fsync", "replace")}, []

    def fsync(descriptor):
        steps.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real["fsync"](descriptor)

    def rename(*paths):
        steps.append("renamed")
        real["replace"](*paths)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    write_atomically(tmp_path / "x", b"content")
    assert steps == [str(temporary_path(tmp_path / "x")), "renamed", str(tmp_path)]
    assert (tmp_path / "x").read_bytes() == b"content"


def test_folders_need_not_be_synced_where_they_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "new").write_bytes(b"new")

    def refuse(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    number = errno.EINVAL
    publish(tmp_path / "new", tmp_path / "x")
    (tmp_path / "new").write_bytes(b"newer")
    number = errno.EIO
    with pytest.raises(OSError, match="Input/output error"):
        publish(tmp_path / "new", tmp_path / "x")


def test_a_failed_write_leaves_what_was(tmp_path, monkeypatch):
    write_atomically(tmp_path / "x", b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        write_atomically(tmp_path / "x", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_only_temporaries_are_removed(tmp_path):
    names = ["train-000000.tar", "notes.tmp", "a.tar", temporary_path(tmp_path / "train-000000.tar").name]
    for name in names:
        (tmp_path / name).touch()
    remove_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[:-1])


def test_temporaries_of_processes_of_one_number_on_two_nodes_differ():
    code = "import os; os.getpid = lambda: 7; from data.publishing import *; print(temporary_path(Path('/x')))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    names = [subprocess.check_output([sys.executable, "-c", code], env=environment, text=True) for _ in range(2)]
    assert all(name.startswith("/x.7-") and name.endswith(".tmp\n") for name in names)
    assert names[0] != names[1]
