"""Evaluation of a run that goes on: each checkpoint once, as it comes, until there are no more."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import following
from pipeline.checkpoint_files import MANIFEST_NAME, describe, name_of
from pipeline.following import as_published, wait_for_run


def publish(run: Path, step: int) -> Path:
    """Leave what looks like a checkpoint and holds against its checksums."""
    checkpoint = run / "checkpoints" / name_of(step)
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_text(f"of step {step}")
    (checkpoint / MANIFEST_NAME).write_text(json.dumps({"weights": describe(checkpoint / "weights")}))
    return checkpoint


def say(run: Path, state: str) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "status.json").write_text(json.dumps({"state": state, "step": 0, "time": 0.0}))


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """What happens, one after the other, while somebody sleeps."""
    events: list[Callable[[], object]] = []
    monkeypatch.setattr(following.time, "sleep", lambda seconds: events.pop(0)())
    return events


def test_each_one_is_yielded_once_until_the_run_has_finished(
    tmp_path: Path, meanwhile: list[Callable[[], object]]
) -> None:
    say(tmp_path, "running")
    publish(tmp_path, 10)
    # A life that was preempted is not the end.
    meanwhile += [
        lambda: None,
        lambda: (publish(tmp_path, 30), publish(tmp_path, 20)),
        lambda: say(tmp_path, "stopped"),
        lambda: say(tmp_path, "running"),
        lambda: (publish(tmp_path, 40), say(tmp_path, "finished")),
    ]
    found = [(copy.name, (copy / "weights").read_text()) for copy in as_published(tmp_path, lambda name: False)]
    assert found == [(name_of(step), f"of step {step}") for step in (10, 20, 30, 40)]
    assert not meanwhile
    assert os.listdir(tmp_path / "eval") == []


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    say(tmp_path, "finished")
    for step in (10, 20):
        publish(tmp_path, step)
    assert [copy.name for copy in as_published(tmp_path, lambda name: name == name_of(10))] == [name_of(20)]


def test_one_that_the_run_deletes_stays_while_it_is_looked_at(tmp_path: Path) -> None:
    say(tmp_path, "finished")
    for step in (10, 20):
        publish(tmp_path, step)
    looked_at = []
    for copy in as_published(tmp_path, lambda name: False):
        shutil.rmtree(tmp_path / "checkpoints" / name_of(10), ignore_errors=True)
        looked_at.append((copy / "weights").read_text())
    assert looked_at == ["of step 10", "of step 20"]


def test_one_that_goes_away_while_it_is_copied_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    say(tmp_path, "failed")
    publish(tmp_path, 10)
    publish(tmp_path, 20)

    def link(source: str, target: str) -> None:
        if name_of(10) in source:
            raise FileNotFoundError(source)
        raise PermissionError(source)  # a file system without links

    monkeypatch.setattr(following.os, "link", link)
    assert [copy.name for copy in as_published(tmp_path, lambda name: False)] == [name_of(20)]


def test_a_damaged_one_is_named_once(
    tmp_path: Path, meanwhile: list[Callable[[], object]], caplog: pytest.LogCaptureFixture
) -> None:
    say(tmp_path, "running")
    (publish(tmp_path, 10) / "weights").write_text("of another step")
    meanwhile += [lambda: None, lambda: say(tmp_path, "finished")]
    assert not list(as_published(tmp_path, lambda name: False))
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"{tmp_path / 'checkpoints' / name_of(10)} is left out: weights changed"
    ]


def test_a_run_that_is_late_is_waited_for(tmp_path: Path, meanwhile: list[Callable[[], object]]) -> None:
    meanwhile += [lambda: None, lambda: say(tmp_path / "r", "running")]
    wait_for_run(tmp_path / "r")
    assert not meanwhile


def test_a_run_that_never_comes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "LONGEST_START", -1.0)
    with pytest.raises(ValueError, match=r"^run: no run in .*/r after -0\.0\d+ minutes; start it first\.$"):
        wait_for_run(tmp_path / "r")
