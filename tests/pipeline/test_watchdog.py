"""Hangs are named and ended, failures end all and are said once, and what is slow but alive goes on."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring.metrics import check
from pipeline.heartbeat import RECENT_STEPS, UNWATCHED, Heartbeat, Phase, Report
from pipeline.preemption import EXIT_HUNG, EXIT_STOPPED
from pipeline.status_file import State, read_status
from pipeline.watchdog import LONG, WatchdogConfig, _behind

REPOSITORY = Path(__file__).parents[2]
# Steps in which all wait for each other, without DeepSpeed and DALI, which take seconds to load.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from pipeline import cli
cli._log_to_console()
from pipeline import distributed
from pipeline.heartbeat import Phase
from pipeline.preemption import ProcessFailedError, StopRequest
from pipeline.watchdog import Watchdog, WatchdogConfig

def run():
    world = distributed.start()
    stop = StopRequest()
    with Watchdog(WatchdogConfig({config}), world, stop) as watchdog:
        heartbeat, rank = watchdog.heartbeat, world.rank
        watchdog.open(Path({directory!r}))
        for step in range({steps}):
            heartbeat.begin(step)
            heartbeat.enter(Phase.forward)
            distributed.any_rank(False)
            {forward}
            distributed.any_rank(False)
            heartbeat.finish(step + 1)
            {after}
            if distributed.any_rank(stop.requested)[0]:
                return stop.exit_code
        heartbeat.enter(Phase.end)
    return 0

try:
    code = run()
except ValueError as error:
    code = cli._refuse(2, error)
except Exception as error:
    code = cli._fail(error)
sys.exit(code)
"""

Start = Callable[..., "Job"]


class Job:
    """Some processes that loop, and how they end."""

    def __init__(self, directory: Path, ranks: int, program: str) -> None:
        self.directory = directory
        (directory / "program.py").write_text(program)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(directory / "program.py")],
                env=os.environ
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "PYTHONUNBUFFERED": "1"}
                | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(REPOSITORY)},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for rank in range(ranks)
        ]

    def wait_for(self, name: str) -> None:
        end = time.monotonic() + 60
        while not (self.directory / name).exists():
            assert time.monotonic() < end
            assert all(process.poll() is None for process in self.processes), self.end()
            time.sleep(0.05)

    def end(self) -> tuple[list[int], list[str]]:
        outputs = ["\n".join(process.communicate(timeout=60)) for process in self.processes]
        return [process.returncode for process in self.processes], outputs


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    jobs: list[Job] = []

    def begin(ranks: int, forward: str = "pass", after: str = "pass", *, config: str = "", steps: int = 8) -> Job:
        parts = {
            name: textwrap.indent(code, " " * 12).strip() for name, code in (("forward", forward), ("after", after))
        }
        program = PROGRAM.format(config=config, directory=str(tmp_path / "heartbeats"), steps=steps, **parts)
        jobs.append(Job(tmp_path, ranks, program))
        return jobs[-1]

    yield begin
    for process in (process for job in jobs for process in job.processes):
        process.kill()
        process.communicate()


def at(rank: int, action: str) -> str:
    """Return code that lets one process do something in its fifth step, and leave a mark before."""
    mark = "Path(__file__).with_name('there').touch()"
    return f"if (rank, step) == ({rank}, 5):\n    {mark}\n    {action}"


STRICT = "step_seconds=2, step_factor=1"


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_hang_is_named_by_every_process(culprit: int, start: Start, tmp_path: Path) -> None:
    job = start(2, at(culprit, "time.sleep(1000)"), config=STRICT)
    job.wait_for("there")
    began = time.monotonic()
    codes, said = job.end()
    assert codes == [EXIT_HUNG, EXIT_HUNG], said
    assert time.monotonic() - began < 15
    for rank in (0, 1):
        named = f"process {culprit} (pid {job.processes[culprit].pid} on {socket.gethostname()}) hangs in forward"
        assert said[rank].count(f"{named} after step 5 for") == 1, said
        stacks = tmp_path / "heartbeats" / f"stacks_{rank:05d}.txt"
        assert str(stacks) in said[rank]
        assert "Traceback" not in said[rank]
        assert "program.py" in stacks.read_text()
        assert "Thread" in stacks.read_text()
    assert "any_rank" in (tmp_path / "heartbeats" / f"stacks_{1 - culprit:05d}.txt").read_text()
    status = read_status(tmp_path)
    assert (status.state, status.step) == (State.hung, 5)
    assert f"process {culprit} (pid" in status.reason


def test_a_process_alone_that_hangs_ends(start: Start) -> None:
    codes, (said,) = start(1, at(0, "time.sleep(1000)"), config=STRICT).end()
    assert codes == [EXIT_HUNG]
    assert "process 0 (pid" in said
    assert "hangs in forward after step 5" in said


def test_a_process_that_is_stopped_is_named_by_the_other(start: Start) -> None:
    job = start(2, at(1, "os.kill(os.getpid(), signal.SIGSTOP)"), config=STRICT)
    said = job.processes[0].communicate(timeout=60)[0]
    assert job.processes[0].returncode == EXIT_HUNG
    assert f"process 1 (pid {job.processes[1].pid} on {socket.gethostname()}) has gone silent in " in said


def test_a_job_that_was_stopped_as_a_whole_goes_on(start: Start) -> None:
    # Seven of the twelve seconds it is stopped; five are within what it may take.
    job = start(1, at(0, "time.sleep(12)"), config="step_seconds=6, step_factor=1")
    job.wait_for("there")
    job.processes[0].send_signal(signal.SIGSTOP)
    time.sleep(7)
    job.processes[0].send_signal(signal.SIGCONT)
    codes, said = job.end()
    assert codes == [0], said


@pytest.mark.parametrize("phase", ["probe", "save"])
def test_what_is_slow_but_alive_is_left_alone(phase: str, start: Start) -> None:
    slow = at(1, "time.sleep(6)")
    codes, said = start(2, after=f"heartbeat.enter(Phase.{phase})\n{slow}", config=STRICT + ", stop_seconds=1").end()
    assert codes == [0, 0], said


@pytest.mark.parametrize(
    ("error", "code", "traceback", "culprit"),
    [
        ("KeyError('the dog ate it')", 1, True, 0),
        ("KeyError('the dog ate it')", 1, True, 1),
        ("ProcessFailedError('the dog ate it')", 1, False, 1),
        ("ValueError('the dog ate it')", 2, False, 1),
        ("OSError(28, 'No space left on device', 'the dog ate it')", 1, False, 1),
    ],
)
def test_an_error_of_one_process_is_said_once(
    error: str, code: int, traceback: bool, culprit: int, start: Start, tmp_path: Path
) -> None:
    job = start(2, at(culprit, f"raise {error}"))
    job.wait_for("there")
    began = time.monotonic()
    codes, said = job.end()
    assert time.monotonic() - began < 12
    assert codes == [code, code], said
    # A line of source in a traceback is not the text of the error.
    text = "\n".join(line for line in "\n".join(said).splitlines() if "raise " not in line)
    assert text.count("the dog ate it") == 1, said
    assert ("Traceback" in said[culprit]) is traceback
    assert said[1 - culprit].strip() == "", said
    assert read_status(tmp_path).state is State.failed
    assert "the dog ate it" in read_status(tmp_path).reason


def test_an_error_of_all_processes_is_said_once(start: Start) -> None:
    codes, said = start(2, "if step == 5:\n    raise ValueError('no such thing')").end()
    assert codes == [2, 2]
    assert "\n".join(said).count("no such thing") == 1, said


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_is_named_once(victim: int, start: Start, tmp_path: Path) -> None:
    job = start(2, at(victim, "os.kill(os.getpid(), signal.SIGKILL)"))
    codes, said = job.end()
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == EXIT_HUNG
    assert said[1 - victim].count(f"process {victim} ") == 1
    assert "ended without a word" in said[1 - victim]
    assert "it was killed, or its node is lost" in said[1 - victim]
    assert "Traceback" not in said[1 - victim]
    assert "frame #" not in said[1 - victim]
    # Nobody speaks for a main process that was killed; `coldpress status` hears its silence.
    assert (tmp_path / "status.json").exists() is (victim == 1)
    if victim:
        assert read_status(tmp_path).state is State.hung
        assert "process 1 " in read_status(tmp_path).reason


def test_a_signal_inside_a_collective_ends_all_within_the_bound(start: Start) -> None:
    job = start(2, at(1, "time.sleep(1000)"), config="stop_seconds=2")
    job.wait_for("there")
    time.sleep(1)
    began = time.monotonic()
    job.processes[0].send_signal(signal.SIGTERM)
    codes, said = job.end()
    assert codes == [EXIT_HUNG, EXIT_HUNG]
    assert 2 < time.monotonic() - began < 15
    for words in said:
        assert "process 1 (pid" in words
        assert "the run was asked to leave, and has watchdog.stop_seconds=2" in words


def test_a_signal_in_a_long_start_is_no_hang(start: Start, tmp_path: Path) -> None:
    job = start(2, "heartbeat.enter(Phase.start)\n" + at(1, "time.sleep(1000)"), config="stop_seconds=2")
    job.wait_for("there")
    for process in job.processes:
        process.send_signal(signal.SIGTERM)
    codes, said = job.end()
    assert codes == [EXIT_STOPPED, EXIT_STOPPED], said
    assert "\n".join(said).count("asked to leave before the first step: there is nothing to save") == 1
    assert "hangs" not in "\n".join(said)
    assert read_status(tmp_path).state is State.stopped


def test_a_second_ctrl_c_leaves_a_collective(start: Start) -> None:
    job = start(2, at(1, "time.sleep(1000)"))
    job.wait_for("there")
    time.sleep(0.5)
    for _ in range(2):
        job.processes[0].send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert job.processes[0].wait(10) == 130


def test_the_heartbeat_file_follows(start: Start, tmp_path: Path) -> None:
    job = start(2, at(1, "time.sleep(7)"))
    job.wait_for("there")
    time.sleep(6)
    seen = [json.loads((tmp_path / "heartbeats" / f"rank_{rank:05d}.json").read_text()) for rank in (0, 1)]
    codes, _ = job.end()
    assert codes == [0, 0]
    for rank, (report, process) in enumerate(zip(seen, job.processes, strict=True)):
        assert (report["rank"], report["pid"], report["host"]) == (rank, process.pid, socket.gethostname())
        assert (report["phase"], report["step"]) == ("forward", 5)
        assert report["waiting"] is (rank == 0)
        assert report["since"] < report["time"] <= time.time()
    last = json.loads((tmp_path / "heartbeats" / "rank_00000.json").read_text())
    assert last["phase"] == "end"
    assert not list((tmp_path / "heartbeats").glob("stacks*"))


SECONDS = st.lists(st.floats(1e-4, 1e3), max_size=RECENT_STEPS)


@given(SECONDS, st.sampled_from(Phase), st.floats(1, 1e3), st.floats(1, 100))
def test_deadlines_follow_the_steps(steps: list[float], phase: Phase, floor: float, factor: float) -> None:
    config = WatchdogConfig(step_seconds=floor, step_factor=factor, long_seconds=5e6)
    allowed = config.allowed(phase, steps)
    if phase in LONG or not steps:
        assert allowed == 5e6
        return
    assert allowed >= floor
    # No step that is among the shorter 19 of 20 comes near it, and one slow step of twenty does not move it.
    assert sum(factor * step <= allowed for step in steps) >= 0.95 * len(steps)
    assert allowed <= max(floor, factor * max(steps))
    slower = [2 * step for step in steps]
    assert config.allowed(phase, slower) == pytest.approx(
        max(floor, 2 * factor * sorted(steps)[-(-95 * len(steps) // 100) - 1])
    )


def test_one_slow_step_in_twenty_does_not_move_the_deadline() -> None:
    config = WatchdogConfig(step_seconds=1, step_factor=10)
    assert config.allowed(Phase.forward, [1.0] * 19 + [600.0]) == 10
    assert config.allowed(Phase.forward, [0.01] * 20) == 1
    assert config.allowed(Phase.forward, [1.0] * 10 + [3.0] * 10) == 30
    assert WatchdogConfig(step_seconds=float("inf")).allowed(Phase.data, [1.0]) == float("inf")


def test_steps_are_measured_without_probes_saves_and_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("pipeline.heartbeat.time.monotonic", lambda: now[0])
    heartbeat = Heartbeat()
    for step, seconds in enumerate([50, 2, 3]):
        heartbeat.begin(step)
        heartbeat.enter(Phase.forward)
        now[0] += seconds
        heartbeat.finish(step + 1)
        heartbeat.enter(Phase.save)
        now[0] += 100
    assert list(heartbeat.step_seconds) == [2, 3]
    assert heartbeat.place.entered == 12
    assert heartbeat.place.step == 3


def test_every_phase_of_a_step_is_counted_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("pipeline.heartbeat.time.monotonic", lambda: now[0])
    heartbeat = Heartbeat()
    # Twice forward and backward: a batch in parts.
    phases = (Phase.tune, Phase.forward, Phase.backward, Phase.forward, Phase.backward, Phase.step)
    for step in range(3):
        heartbeat.begin(step)
        now[0] += 0.5
        for seconds, phase in enumerate(phases, start=1):
            heartbeat.enter(phase)
            now[0] += seconds
        heartbeat.finish(step + 1)
        heartbeat.enter(Phase.save)
        now[0] += 100
    live = heartbeat.live()
    assert live is not None
    samples = [sample for each in live.durations for family in each.collect() for sample in family.samples]
    totals = {s.labels["phase"]: s.value for s in samples if s.name == "coldpress_phase_duration_seconds_sum"}
    assert totals == {"data": 1.5, "tune": 3, "forward": 18, "backward": 24, "step": 18}
    assert {s.value for s in samples if s.name.endswith("_count")} == {3.0}
    [steps] = [s.value for s in samples if s.name == "coldpress_step_duration_seconds_sum"]
    assert steps == sum(totals.values())
    assert live.phase == "save"
    assert live.numbers["phases_total"] == heartbeat.place.entered == 27


def test_the_seconds_of_a_life_are_those_of_its_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [7.0]
    monkeypatch.setattr("pipeline.heartbeat.time.monotonic", lambda: now[0])
    heartbeat = Heartbeat()
    now[0] += 20
    for step in range(2):
        heartbeat.begin(step)
        for seconds, phase in ((1, Phase.forward), (2, Phase.backward), (4, Phase.step)):
            now[0] += seconds
            heartbeat.enter(phase)
        now[0] += 8
        heartbeat.finish(step + 1)
        now[0] += 16
        heartbeat.enter(Phase.save)
        now[0] += 32
    heartbeat.enter(Phase.end)
    totals = heartbeat.totals()
    check(totals)
    assert sum(totals.values()) == now[0] - 7
    assert {name.split("_")[1]: seconds for name, seconds in totals.items() if seconds} == {
        "start": 20,
        "data": 2,
        "forward": 4,
        "backward": 8,
        "step": 16,
        "report": 32,
        "save": 64,
    }


def test_what_nobody_watches_costs_and_keeps_nothing() -> None:
    before = UNWATCHED.place
    UNWATCHED.begin(1)
    UNWATCHED.enter(Phase.forward)
    UNWATCHED.finish(2)
    assert UNWATCHED.place is before
    assert UNWATCHED.live() is None
    assert UNWATCHED.totals() == {}
    heartbeat, begin = Heartbeat(), time.perf_counter()
    for _ in range(10_000):
        heartbeat.enter(Phase.forward)
    assert (time.perf_counter() - begin) / 10_000 < 50e-6


@pytest.mark.parametrize(
    ("entered", "waiting", "behind"),
    [
        ([7, 6, 7], [True, False, True], 1),
        # In one phase the others wait for the one that does not.
        ([7, 7, 7], [True, True, False], 2),
        # All wait for their GPUs.
        ([7, 7], [False, False], None),
        ([7], [False], 0),
        ([7], [True], 0),
        ([7, 7], [True, True], None),
        ([8, 7], [True, True], 1),
    ],
)
def test_who_is_behind(entered: list[int], waiting: list[bool], behind: int | None) -> None:
    reports = [Report(i, entered=e, waiting=w) for i, (e, w) in enumerate(zip(entered, waiting, strict=True))]
    found = _behind(reports)
    assert (found and found.rank) == behind if found else behind is None


@pytest.mark.parametrize("key", ["step_seconds", "step_factor", "long_seconds", "stop_seconds"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_refusals(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^watchdog\.{key} must be above 0, got .*; inf waits for ever\.$"):
        WatchdogConfig(**{key: value})
