"""TensorBoard and W&B with the real packages: what was written is read back, and a resumed run is one run."""

import importlib
import json
import logging
import math
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from monitoring.expendable import Expendable
from monitoring.sinks import MetricSink, MonitorConfig, build_sinks

SETTINGS = {"run": "a", "optim": {"betas": (0.9, 0.999)}, "place": Path("/x")}


@pytest.fixture(autouse=True)
def no_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test talk to the network, whatever the machine has set up."""
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


def open_sinks(directory: Path, resume_step: int = 0, rank: int = 0, **loggers: object) -> MetricSink:
    directory.mkdir(parents=True, exist_ok=True)
    config = MonitorConfig(prometheus=False, **loggers)  # type: ignore[arg-type]
    return build_sinks(
        config,
        directory,
        run="a run/of #1",
        rank=rank,
        local_rank=rank,
        world_size=2,
        resume_step=resume_step,
        settings=SETTINGS,
    )


def live(directory: Path, steps: range, resume_step: int, close: bool = True, **loggers: object) -> None:
    """Report some steps as one life of a run does; without `close` as one that is killed."""
    sinks = open_sinks(directory, resume_step, **loggers)
    for step in steps:
        sinks.write(step, {"loss": step + resume_step / 1000, "grad_norm": math.nan})
        if step == 4:
            sinks.write(step, {"knn_top1_ratio": 0.5})
    if close:
        sinks.close()


def scalars(directory: Path, name: str) -> dict[int, float]:
    pytest.importorskip("tensorboard")
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    read = accumulator.EventAccumulator(str(directory / "tensorboard")).Reload()
    assert set(read.Tags()["scalars"]) == {"loss", "grad_norm", "knn_top1_ratio"}
    events = read.Scalars(name)
    assert len({event.step for event in events}) == len(events)
    return {event.step: event.value for event in events}


def logged(content: bytes) -> Iterator[bytes]:
    """Yield the records of a file of W&B: LevelDB's log format behind a head of seven bytes."""
    block, place, record = 32768, 7, b""
    while place + 7 <= len(content):
        if block - place % block < 7:
            place += block - place % block
            continue
        size, kind = struct.unpack_from("<HB", content, place + 4)
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        # 1 is a whole record, 4 the last part of one.
        if kind in (1, 4):
            yield record
            record = b""


def wandb_rows(directory: Path) -> list[dict[str, float]]:
    """Return the history of the one offline run that a directory has."""
    records = importlib.import_module("wandb.proto.wandb_internal_pb2")
    (file,) = (directory / "wandb").glob("offline-run-*/*.wandb")
    assert file.stem == f"run-{(directory / 'wandb_id').read_text().strip()}"
    rows = []
    for data in logged(file.read_bytes()):
        record = records.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            rows.append(items | {"_step": record.history.step.num})
    return rows


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path: Path) -> None:
    live(tmp_path / "a", range(1, 9), 0, close=False, tensorboard=True)
    live(tmp_path / "a", range(6, 11), 5, tensorboard=True)
    losses = scalars(tmp_path / "a", "loss")
    assert losses == pytest.approx({**{s: s for s in range(1, 6)}, **{s: s + 0.005 for s in range(6, 11)}})
    assert scalars(tmp_path / "a", "knn_top1_ratio") == {4: 0.5}
    assert math.isnan(scalars(tmp_path / "a", "grad_norm")[1])


def test_tensorboard_forgets_a_life_that_never_saved(tmp_path: Path) -> None:
    live(tmp_path / "a", range(1, 5), 0, close=False, tensorboard=True)
    live(tmp_path / "a", range(1, 5), 0, tensorboard=True)
    assert list(scalars(tmp_path / "a", "loss")) == [1, 2, 3, 4]


def test_wandb_has_one_offline_run_however_many_lives(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    live(tmp_path / "a", range(1, 9), 0, wandb="offline")
    first = (tmp_path / "a" / "wandb_id").read_text()
    assert first.startswith("a-run-of--1-")
    live(tmp_path / "a", range(6, 11), 5, wandb="offline")
    assert (tmp_path / "a" / "wandb_id").read_text() == first
    rows = wandb_rows(tmp_path / "a")
    assert {row["_step"]: row["loss"] for row in rows} == pytest.approx(
        {**{s: s for s in range(1, 6)}, **{s: s + 0.005 for s in range(6, 11)}}
    )
    assert [row["knn_top1_ratio"] for row in rows if "knn_top1_ratio" in row] == [0.5]
    # When it was reported, not when it was repeated.
    written = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["_timestamp"] == pytest.approx(written[0]["time"], abs=0.5)


def test_wandb_repeats_long_histories_thinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setattr("monitoring.wandb.REPEATED", 4)
    live(tmp_path / "a", range(1, 21), 0)
    live(tmp_path / "a", range(21, 22), 20, wandb="offline")
    rows = wandb_rows(tmp_path / "a")
    assert [row["_step"] for row in rows] == [1, 4, 6, 12, 18, 21]
    assert rows[1]["knn_top1_ratio"] == 0.5


def test_another_run_of_the_name_has_another_id(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run_id = importlib.import_module("monitoring.wandb").run_id
    (tmp_path / "b").mkdir()
    assert run_id(tmp_path, "x") == run_id(tmp_path, "x") != run_id(tmp_path / "b", "x")


def test_wandb_online_without_a_service_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setattr("monitoring.wandb.INIT_SECONDS", 2.0)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    began = time.monotonic()
    live(tmp_path / "a", range(1, 4), 0, wandb="online")
    assert time.monotonic() - began < 20
    assert [r.levelname for r in caplog.records if "W&B" in r.message] == ["WARNING"]
    assert len((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()) == 3


def test_only_the_main_process_talks(tmp_path: Path) -> None:
    sinks = open_sinks(tmp_path / "a", rank=1, tensorboard=True, wandb="offline")
    sinks.write(1, {"loss": 1.0})
    sinks.close()
    assert not list((tmp_path / "a").iterdir())


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed_is_refused_before_the_run(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MonitorConfig(**{package: {"tensorboard": True, "wandb": "offline"}[package]})
    monkeypatch.setattr("monitoring.sinks.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=rf"^monitor\.{package} needs the package {package}, .*; pip install {package}"
    ):
        config.check_installed()
    MonitorConfig().check_installed()


def test_modes_of_wandb() -> None:
    with pytest.raises(ValueError, match=r"^monitor\.wandb must be off, offline or online, got sometimes\.$"):
        MonitorConfig(wandb="sometimes")


@pytest.mark.parametrize("failing", ["build", "write", "close"])
def test_what_fails_is_one_warning_and_silence(failing: str, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[str] = []

    class Failing:
        def write(self, step: int, metrics: object) -> None:
            calls.append("write")
            if failing == "write":
                raise BrokenPipeError("no one\nlistens")

        def close(self) -> None:
            calls.append("close")
            if failing == "close":
                raise RuntimeError

    def build() -> Failing:
        if failing == "build":
            raise OSError("full")
        return Failing()

    sink = Expendable("the cloud", build)
    for step in (1, 2):
        sink.write(step, {"loss": 1.0})
    sink.close()
    sink.close()
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "nothing more goes to the cloud" in caplog.text
    assert calls == {"build": [], "write": ["write"], "close": ["write", "write", "close"]}[failing]
