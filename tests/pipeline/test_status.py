"""What `coldpress status` says of runs that go on, ended, were killed, or left damaged files."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.cli import dispatch
from pipeline.compose import load
from pipeline.run_status import TAIL_BYTES, look_at, run_directories
from pipeline.status import SILENT_SECONDS, duration, run, table
from pipeline.status_file import State, StatusFile, read_status

Make = Callable[..., Path]
LINE = {"loss": 1.25, "progress_ratio": 0.5, "eta_seconds": 60.0, "samples_per_second": 1234.0, "step": 40, "time": 0.0}


@pytest.fixture
def make_run(tmp_path: Path) -> Make:
    """Return a maker of run directories that were last heard of `age` seconds ago."""

    def make(name: str, state: State | None, age: float = 0.0, reason: str = "", line: dict = LINE) -> Path:
        directory = tmp_path / "runs" / name
        (directory / "heartbeats").mkdir(parents=True)
        (directory / "config.yaml").write_text("run: a")
        (directory / "metrics.jsonl").write_text(json.dumps({"knn_top1_ratio": 0.5, "step": 30}) + "\n")
        with (directory / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        beat = {"rank": 0, "host": "node7", "pid": 99, "step": 41, "phase": "backward"}
        (directory / "heartbeats" / "rank_00000.json").write_text(json.dumps(beat))
        if state is not None:
            then = {"state": state, "step": 38, "time": time.time() - age, "reason": reason}
            (directory / "status.json").write_text(json.dumps(then))
        for path in [*directory.iterdir(), *(directory / "heartbeats").iterdir()]:
            os.utime(path, (time.time() - age,) * 2)
        return directory

    return make


def status(directory: Path, *words: str) -> int:
    return run(load("status", [f"runs={directory}", *words]))


def test_a_run_that_goes_on_is_one_line(make_run: Make, capsys: pytest.CaptureFixture[str]) -> None:
    directory = make_run("first", State.running, 3)
    assert status(directory.parent, "run=first") == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == [
        "run",
        "state",
        "done",
        "step",
        "left",
        "images/s",
        "loss",
        "k-NN",
        "eval",
        "saved",
        "heard",
    ]
    assert " ".join(line.split()) == "first running 50.0 % 40 60 s 1,234 1.25 50.0 % - - 3 s ago"


def test_a_run_that_has_gone_silent_is_in_alarm(
    make_run: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What does not fit the terminal is cut.
    monkeypatch.setenv("COLUMNS", "200")
    directory = make_run("first", State.running, 7200)
    assert status(directory.parent, "run=first") == 1
    said = re.sub(r" +", " ", capsys.readouterr().out)
    assert "first ALARM" in said
    # A slow machine takes seconds to look.
    assert re.search(r"nothing heard for 7,2\d\d s; last in backward after step 41, pid 99 on node7", said)
    # An overview is not a verdict on one run.
    assert status(directory.parent) == 0
    assert status(directory.parent, "run=first", "silent_seconds=7300") == 0


@pytest.mark.parametrize("trace", ["heartbeats/rank_00000.json", "metrics.jsonl"])
def test_any_trace_of_the_main_process_is_heard(trace: str, make_run: Make) -> None:
    directory = make_run("first", State.running, 7200)
    os.utime(directory / trace)
    assert not look_at(directory, SILENT_SECONDS).alarm


@pytest.mark.parametrize("state", [State.stopped, State.hung, State.failed, State.finished])
def test_what_has_ended_is_in_no_alarm_however_long_ago(state: State, make_run: Make) -> None:
    found = look_at(make_run("first", state, 1e7, "out of\nmemory"), SILENT_SECONDS)
    assert (found.state, found.alarm, found.reason) == (state.value, False, "out of\nmemory")
    assert "  out of memory" in table([found], 80).splitlines()


def test_a_run_that_died_before_it_said_anything_is_in_alarm(make_run: Make) -> None:
    assert not look_at(make_run("young", None, 5), SILENT_SECONDS).alarm
    found = look_at(make_run("dead", None, 500), SILENT_SECONDS)
    assert (found.state, found.alarm) == ("starting", True)


def test_who_needs_somebody_comes_first(make_run: Make, capsys: pytest.CaptureFixture[str]) -> None:
    for name, state, age in (
        ("old", State.finished, 900),
        ("new", State.finished, 30),
        ("broken", State.failed, 900),
        ("lost", State.running, 900),
        ("alive", State.running, 1),
    ):
        directory = make_run(name, state, age)
    (directory.parent / "no-run").mkdir()
    status(directory.parent)
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:] if not line.startswith("  ")]
    assert names == ["lost", "alive", "broken", "new", "old"]


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("status.json", '{"state": "runn', "status.json is damaged"),
        ("status.json", "[1]", "status.json has no state, step and time"),
        ("status.json", '{"state": "dancing", "step": 1, "time": 1}', "'dancing' is not a valid State"),
        ("metrics.jsonl", '{"loss": 1}\n"step" of old\n{"loss": 1}\n[', "metrics.jsonl has a line that is no report"),
        ("metrics.jsonl", '["loss"]\n{"eta', "metrics.jsonl has a line that is no report"),
    ],
)
def test_damaged_files_are_named(name: str, text: str, named: str, make_run: Make) -> None:
    directory = make_run("first", State.finished, 5)
    (directory / name).write_text(text)
    found = look_at(directory, SILENT_SECONDS)
    assert found.state == "unreadable"
    assert named in found.reason
    assert "\n  " in table([found], 80)


def test_files_that_may_not_be_read_are_named(make_run: Make) -> None:
    directory = make_run("first", State.running, 5)
    for name in ("status.json", "metrics.jsonl"):
        (directory / name).unlink()
        (directory / name).mkdir()
    assert look_at(directory, 1).reason == "status.json: Is a directory; metrics.jsonl: Is a directory"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_run_of_somebody_else_is_listed_and_named(make_run: Make) -> None:
    directory = make_run("first", State.running, 5)
    directory.chmod(0)
    try:
        (listed,) = run_directories(directory.parent)
        assert "Permission denied" in look_at(listed, 1).reason
    finally:
        directory.chmod(0o700)


def test_a_torn_last_line_and_a_loss_that_is_no_number_are_no_damage(make_run: Make) -> None:
    directory = make_run("first", State.running, 5, line=LINE | {"loss": None, "eta_seconds": None})
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"loss": 3.')
    found = look_at(directory, SILENT_SECONDS)
    assert found.state == "running"
    assert (str(found.loss), found.eta_seconds, found.step) == ("nan", None, 40)
    assert " nan " in table([found], 120)


def test_only_the_end_of_a_long_file_is_read(make_run: Make) -> None:
    directory = make_run("first", State.finished)
    row = json.dumps(LINE)
    (directory / "metrics.jsonl").write_text("not JSON\n" + f"{row}\n" * (2 * TAIL_BYTES // len(row)))
    assert look_at(directory, SILENT_SECONDS).loss == 1.25


def test_an_empty_folder_and_a_missing_one_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(tmp_path) == 0
    assert capsys.readouterr().out == f"no runs in {tmp_path}.\n"
    assert dispatch(["status", f"runs={tmp_path / 'gone'}"]) == 2
    assert dispatch(["status", f"runs={tmp_path}", "run=none"]) == 2
    assert dispatch(["status", "silent_seconds=0"]) == 2
    assert dispatch(["status", "run=a/b"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 4


def test_a_table_gives_up_columns_rather_than_lines(make_run: Make) -> None:
    found = [look_at(make_run("a-run-with-a-name-that-goes-on-and-on-and-on", State.failed, 5, "x" * 300), 120.0)]
    for width in (80, 100, 120):
        assert max(map(len, table(found, width).splitlines())) <= width
    assert "eval" not in table(found, 80)


def test_machines_are_told_in_json(make_run: Make, capsys: pytest.CaptureFixture[str]) -> None:
    directory = make_run("first", State.running, 300, line=LINE | {"loss": None})
    (directory / "eval").mkdir()
    (directory / "eval" / "knn-init.json").write_text(json.dumps({"top1": {"knn": {"10": 0.25, "20": 0.5}}}))
    status(directory.parent, "json=true")
    (told,) = json.loads(capsys.readouterr().out)
    assert (told["alarm"], told["loss"], told["knn_top1"], told["evaluated_top1"]) == (True, None, 0.5, 0.5)


def test_thousands_of_finished_runs_cost_little_each(make_run: Make) -> None:
    first = make_run("run-0", State.finished)
    for i in range(1, 200):
        shutil.copytree(first, first.with_name(f"run-{i}"))
    opened = []
    sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" and watching else None)
    watching = True
    assert len([look_at(directory, SILENT_SECONDS) for directory in run_directories(first.parent)]) == 200
    watching = False
    # Checkpoints are not opened, nor is a whole file of metrics: status, its end, latest.
    assert len(opened) == 3 * 200


@pytest.mark.parametrize(("seconds", "text"), [(3.4, "3 s"), (600, "10 min"), (7200, "2 h"), (1e6, "12 d")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_status_starts_without_torch() -> None:
    code = "import sys; from pipeline.cli import dispatch; dispatch(['status', 'runs=.']); exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_a_status_on_a_full_disk_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = StatusFile(tmp_path)
    file.say(State.running, 3)
    (tmp_path / ".status.json.MainThread.tmp").mkdir()
    file.say(State.finished, 4)
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert (read_status(tmp_path).state, read_status(tmp_path).step) == (State.running, 3)
