"""`coldpress <command> [key=value ...]`: finds the command, loads its config, turns refusals into exit codes."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
from typing import Any

from data.verify import VerificationError
from pipeline import compose
from pipeline.preemption import ProcessFailedError

# command -> the module that runs it, and what it does.
COMMANDS: dict[str, tuple[str, str]] = {
    "shard": ("data.shard", "images -> WebDataset tars with index and manifest"),
    "verify": ("data.verify", "re-derive a sharded set and compare it with its manifest"),
    "plan": ("pipeline.plan", "what a training run would do and cost; runs nothing"),
    "train": ("pipeline.train", "pre-train, or go on where the run was stopped"),
    "evaluate": ("pipeline.evaluate", "k-NN accuracy of a run's encoder"),
    "bench": ("pipeline.bench", "step time against what the arithmetic promises"),
    "demo": ("pipeline.demo", "all of the above in minutes"),
}
# Commands that keep the user's own words beside what they produce.
KEEPS_OVERRIDES = {"train"}

REFUSED, FAILED, INTERRUPTED = 2, 1, 130


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 a check failed, 2 a refusal of what was asked, 75 saved and stopped."""
    sys.exit(dispatch(sys.argv[1:] if arguments is None else arguments))


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
        return _refuse(REFUSED, error)
    except VerificationError as error:
        return _refuse(FAILED, error)
    except ProcessFailedError as error:
        print(f"coldpress: {error}", file=sys.stderr)  # whichever process it is: perhaps no other one knows
        return FAILED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        return _refuse(FAILED, f"{error.filename or 'output'}: {error.strerror}; free some space or write elsewhere.")
    except KeyboardInterrupt:
        return _refuse(INTERRUPTED, "interrupted; the same command goes on from here.")


def _run(command: str, overrides: list[str]) -> int:
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
    for noisy in ("deepspeed", "DeepSpeed", "matplotlib", "PIL"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
