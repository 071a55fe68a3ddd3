"""`coldpress <command> [key=value ...]`: finds the command, loads its config, turns refusals into exit codes."""

from __future__ import annotations

# Only what Python starts with anyway: from `main` on, Ctrl-C is one sentence, also while the rest is imported.
import errno
import faulthandler
import importlib
import logging
import os
import select
import signal
import sys
import time
from types import FrameType
from typing import Any

# command -> the module that runs it, and what it does.
COMMANDS: dict[str, tuple[str, str]] = {
    "shard": ("data.shard", "images -> WebDataset tars with index and manifest"),
    "verify": ("data.verify", "re-derive a sharded set and compare it with its manifest"),
    "plan": ("pipeline.plan", "what a training run would do and cost; runs nothing"),
    "train": ("pipeline.train", "pre-train, or go on where the run was stopped"),
    "doctor": ("pipeline.doctor", "machine, disks, shards, and a run in small, before a run is started"),
    "status": ("pipeline.status", "where every run is, which have gone silent, and why others ended"),
    "report": ("pipeline.report", "a page of a run, or of several side by side"),
    "evaluate": ("pipeline.evaluate", "what a run's encoder is worth: k-NN, linear classifiers, fine-tuning"),
    "export": ("pipeline.export", "a run's encoder for timm, PyTorch or ONNX, with a model card"),
    "analyze": (
        "pipeline.analyze",
        "how far compressed gradients are from the true one, and the schedule that follows",
    ),
    "compare": ("pipeline.compare", "every method with and without compression at the same cost"),
    "compare-freezing": ("pipeline.compare_freezing", "a run without freezing, with it, and as cheap but not frozen"),
    "study": ("pipeline.study", "baseline, analysis and schedule, and what each way to compress is worth"),
    "bench": ("pipeline.bench", "steps, loaders, checkpoints, processes and more, each against a baseline or a limit"),
    "demo": ("pipeline.demo", "all of the above in minutes"),
    "gpu-exporter": ("monitoring.exporters.gpu_exporter", "the GPUs of this node, for Prometheus"),
    "slurm-exporter": ("monitoring.exporters.slurm_exporter", "jobs and nodes of this cluster, for Prometheus"),
}
# Commands that keep the user's own words beside what they produce.
KEEPS_OVERRIDES = {"train", "bench"}
# Commands that a scheduler asks to leave, and that are run again then.
SAVES = {"train", "evaluate"}
# Commands that go on where they were interrupted, and commands that leave at the first Ctrl-C, at once.
GOES_ON = {"shard", "train", "analyze"}
LEAVES_AT_ONCE = {"shard", "verify"}
# Commands whose processes under Slurm do not meet, so that each says why it ends.
SPEAKS_FOR_ITSELF = {"shard"}

REFUSED, FAILED, INTERRUPTED, UNHEARD = 2, 1, 130, 141
_REMEDIES = {
    errno.ENOSPC: "free some space or write elsewhere",
    errno.EDQUOT: "free some space or write elsewhere",
    errno.EROFS: "write elsewhere",
    errno.EACCES: "change its permissions, or name another place",
    errno.EPERM: "change its permissions, or name another place",
    errno.ENOTDIR: "name another place",
    errno.EEXIST: "name another place",
    errno.EIO: "check the disk, or copy it from elsewhere",
}


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 a failure, 2 a refusal of what was asked, 75 saved and stopped, 76 hung."""
    words = sys.argv[1:] if arguments is None else arguments
    # A job in the background has it ignored, and that stays so.
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible and LEAVES_AT_ONCE.intersection(words[:1]):
        signal.signal(signal.SIGINT, _Interrupt())
    if SAVES.intersection(words[:1]):
        _be_ready_for_schedulers()
    try:
        code = dispatch(words)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_listens():
            raise
        code = UNHEARD
    _leave_in_peace()
    sys.exit(code)


def _be_ready_for_schedulers() -> None:
    from pipeline.preemption import leave_when_asked

    leave_when_asked()
    # For operators: where all threads are, while the process goes on.
    faulthandler.register(signal.SIGQUIT, all_threads=True)


def _nobody_listens() -> bool:
    """Tell whether it was `| head` that closed its pipe; what is still to be printed goes nowhere then."""
    out = select.poll()
    out.register(sys.stdout.fileno(), 0)
    closed = bool(out.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


class _Interrupt:
    """Handle Ctrl-C; a second one soon after must not disturb the leaving, a later one helps where that hangs."""

    SOON = 3.0  # seconds

    def __init__(self) -> None:
        self._last = -self.SOON

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._last > self.SOON:
            self._last = now
            raise KeyboardInterrupt


def _leave_in_peace() -> None:
    # Python's own end would give Ctrl-C back its deadly meaning, and the exit code would be another.
    if isinstance(signal.getsignal(signal.SIGINT), _Interrupt):
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def dispatch(arguments: list[str]) -> int:
    """Return the exit code of one command line."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0
    command, *overrides = arguments
    _log_to_console()
    try:
        return _run(command, overrides)
    except ValueError as error:
        return (_say if command in SPEAKS_FOR_ITSELF else _refuse)(REFUSED, error)
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from here" if command in GOES_ON else ""
        return _refuse(INTERRUPTED, f"interrupted{goes_on}.")
    except Exception as error:
        return _fail(error)


def _fail(error: Exception) -> int:
    """Say what can be said in a sentence; raise all else as it was."""
    from data.verify import VerificationError
    from pipeline.preemption import PeerFailedError, ProcessFailedError

    if isinstance(error, VerificationError):
        return _refuse(FAILED, error)
    if isinstance(error, ProcessFailedError):
        return _say(error.code, error)
    if isinstance(error, PeerFailedError):
        return error.code
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        return _say(FAILED, f"{error.filename or 'output'}: {error.strerror}; {_REMEDIES[error.errno]}.")
    raise error


def _run(command: str, overrides: list[str]) -> int:
    from pipeline import compose

    if command not in COMMANDS:
        raise ValueError(f"{command} is not a command; choose from {', '.join(COMMANDS)}.")
    if any(word in ("-h", "--help") for word in overrides):
        print(_help(command, [word for word in overrides if word not in ("-h", "--help")]))
        return 0
    if "--cfg" in overrides:
        print(compose.show(command, [o for o in overrides if o != "--cfg"]), end="")
        return 0
    loaded: Any = compose.load(command, overrides)
    module = importlib.import_module(COMMANDS[command][0])
    extra = (overrides,) if command in KEEPS_OVERRIDES else ()
    return int(module.run(loaded, *extra) or 0)


def _refuse(code: int, reason: object) -> int:
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        _say(code, reason)
    return code


def _say(code: int, reason: object) -> int:
    """Say why this process ends, whichever it is: perhaps no other one knows."""
    print(f"coldpress: {reason}", file=sys.stderr)
    return code


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: coldpress <command> [key=value ...]",
            "",
            *lines,
            "",
            "coldpress <command> --help lists its keys.",
        ]
    )


def _help(command: str, overrides: list[str]) -> str:
    from pipeline import compose

    groups = [f"  {name}={'|'.join(options)}" for name, options in compose.groups_of(command).items()]
    lines = [f"usage: coldpress {command} [key=value ...]", "", COMMANDS[command][1], ""]
    if groups:
        lines += ["choices:", *groups, ""]
    return "\n".join(
        [*lines, "keys and defaults (??? is required; after compression=staged and the like, those of the choice):"]
    ) + ("\n" + compose.show(command, overrides))


def _log_to_console() -> None:
    level = logging.INFO if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout)
    # PyTorch says it at length, when the store that the processes met in has gone.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for noisy in ("deepspeed", "DeepSpeed", "matplotlib", "PIL", "onnxscript", "onnx_ir"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
