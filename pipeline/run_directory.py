"""What a run leaves on disk beside its checkpoints, and when a directory may be used."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

from pipeline.compose import to_yaml
from pipeline.compression import CompressionSchedule, Staged
from pipeline.compression.schedule_file import in_line
from pipeline.config import GROUPS, TrainConfig
from pipeline.run_status import CONFIG_NAME
from pipeline.status_file import State, StatusFile, read_status

PACKAGES = (
    "torch",
    "timm",
    "deepspeed",
    "nvidia-dali-cuda130",
    "webdataset",
    "hydra-core",
    "prometheus-client",
)

log = logging.getLogger(__name__)


class RunDirectory:
    """The files of one run; only the main process may construct one."""

    def __init__(self, config: TrainConfig) -> None:
        """Look at the directory without touching it.

        Raises:
            ValueError: it holds a run that this one may neither resume nor overwrite.
        """
        self.path = config.directory
        self._config = config
        self._log: logging.Handler | None = None
        self._status = StatusFile(self.path)
        self._check()

    def clear(self) -> None:
        """Delete an earlier run if that was asked for."""
        if self._config.overwrite and self.path.exists():
            shutil.rmtree(self.path)

    def open(self, overrides: list[str]) -> None:
        """Create or reopen the directory and write down how the run was started; a new one is its user's alone."""
        is_new = not (self.path / CONFIG_NAME).exists()
        self.path.mkdir(parents=True, exist_ok=True)
        if is_new:
            # Another process may have created it meanwhile. Who shares a run says so (chmod), and that stays.
            self.path.chmod(0o700)
        (self.path / CONFIG_NAME).write_text(to_yaml(self._config))
        words = without_files(overrides, self._config.compression)
        (self.path / "overrides.yaml").write_text("".join(f"- {json.dumps(word)}\n" for word in words))
        (self.path / "environment.json").write_text(json.dumps(_environment(self._config), indent=1))
        self._log = _log_to(self.path / "train.log")

    def status(self, state: State, step: int) -> None:
        """Say what the run is doing: running, stopped or finished."""
        self._status.say(state, step)

    def failed(self, step: int, reason: Exception) -> None:
        """Say what ended the run, in its log, too: the console is told by whoever ends the process."""
        if self._log is not None:
            self._log.handle(logging.makeLogRecord({"levelname": "ERROR", "msg": str(reason)}))
        self._status.say(State.failed, step, str(reason))

    def _check(self) -> None:
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        if not (self.path / CONFIG_NAME).exists():
            raise ValueError(f"run: {self.path} holds something that is not a run; choose another run=NAME.")
        if self._config.resume == "never" and not self._config.overwrite:
            raise ValueError(
                f"run: {self.path} holds an earlier run and resume=never was said; "
                "say overwrite=true to delete it, resume=auto to go on, or another run=NAME."
            )


def state_of(directory: Path) -> str:
    """Return what a run was doing when it last said so: running, stopped, hung, finished or failed; nothing before."""
    try:
        return read_status(directory).state.value
    except OSError:
        return ""


def read_overrides(directory: Path) -> list[str]:
    """Return the overrides with which a run was started.

    Raises:
        ValueError: there is no run in the directory.
    """
    try:
        lines = (directory / "overrides.yaml").read_text().splitlines()
    except OSError as error:
        raise ValueError(f"run: no run in {directory}; give run=NAME and, if it is elsewhere, runs=DIR.") from error
    return [json.loads(line[2:]) for line in lines]


def without_files(overrides: list[str], compression: CompressionSchedule) -> list[str]:
    """Return overrides that say the same without the schedule's file, which may be gone when they are read again."""
    keys = ("compression.file", "compression.stages")
    named = [word for word in overrides if word.lstrip("+").partition("=")[0] in keys]
    if not isinstance(compression, Staged) or not any("compression.file=" in word for word in named):
        return overrides
    stages = ", ".join(in_line(stage) for stage in compression.stages)
    return [
        *(word for word in overrides if word not in named),
        "compression.file=''",
        f"compression.stages=[{stages}]",
    ]


def _environment(config: TrainConfig) -> dict[str, object]:
    slurm = {k: v for k, v in os.environ.items() if k.startswith("SLURM_")}
    return {
        "python": sys.version,
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "command": sys.argv,
        "choices": _choices(config),
        "slurm": slurm,
    }


def _choices(config: TrainConfig) -> dict[str, str]:
    """Return the option of each group: config.yaml has only their keys."""
    names = {kind: name for options in GROUPS.values() for name, kind in options.items()}
    return {group: names[type(getattr(config, group))] for group in GROUPS}


class _LogFile(logging.FileHandler):
    """A copy of what the console is told; a line that does not fit the disk is left out of it."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Say nothing: a page of traceback for each line would hide the sentence that the run ends with."""


def _log_to(path: Path) -> logging.Handler:
    handler = _LogFile(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    return handler
