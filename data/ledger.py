"""What an interrupted `coldpress shard` leaves to the next one: its plan and a record of every shard.

The ledger is a folder in the output. It is there from the first byte until after the manifest, so that an
output is either finished (manifest), unfinished (ledger), or not ours.
"""

import fcntl
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from data.manifest import Shard, write_atomically
from data.pack import PackedShard

LEDGER_NAME = ".unfinished"


class Ledger:
    """Own an unfinished output, for one command at a time: ``with Ledger(output, plan) as ledger``.

    Entering raises ValueError when the output holds anything but an unfinished set of the same plan.
    """

    def __init__(self, output: Path, plan: dict[str, Any]) -> None:
        self.output = output
        self.folder = output / LEDGER_NAME
        self.plan = plan

    def __enter__(self) -> "Ledger":
        try:
            self._refuse_strangers()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder, os.O_RDONLY)
            try:
                self._take()
            except BaseException:
                os.close(self._lock)
                raise
        except OSError as error:
            raise ValueError(
                f"shard.output: cannot write to {self.output} ({error.strerror}); choose another folder."
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def _refuse_strangers(self) -> None:
        if not self.folder.exists() and self.output.exists() and any(self.output.iterdir()):
            raise ValueError(f"shard.output: {self.output} is not empty; choose a new or empty folder.")

    def _take(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"shard.output: another command is writing to {self.output}; wait for it, or stop it."
            ) from None
        path = self.folder / "plan.json"
        if not path.exists():
            write_atomically(path, json.dumps(self.plan).encode("utf-8"))
        refuse_other_plan(self.output, json.loads(path.read_text(encoding="utf-8")), self.plan)

    def record(self, packed: PackedShard) -> None:
        """Remember a written shard."""
        write_atomically(self._record_path(packed.shard.name), json.dumps(asdict(packed)).encode("ascii"))

    def recall(self, shard_name: str) -> PackedShard | None:
        """Return the record of a shard written by an earlier command, if there is one."""
        path = self._record_path(shard_name)
        if not path.exists():
            return None
        fields = json.loads(path.read_text(encoding="ascii"))
        shard = Shard(**fields.pop("shard"))
        rejected = [(name, reason) for name, reason in fields.pop("rejected")]
        return PackedShard(shard, rejected, **fields)

    def _record_path(self, shard_name: str) -> Path:
        return self.folder / f"{shard_name}.json"


def discard(output: Path) -> None:
    """Remove the ledger of a finished set."""
    shutil.rmtree(output / LEDGER_NAME, ignore_errors=True)


def refuse_other_plan(output: Path, held: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise ValueError, naming what differs, unless both plans are the same."""
    differing = [f"{name}={held.get(name)}" for name in asked if held.get(name) != asked[name]]
    if differing:
        raise ValueError(
            f"shard.output: {output} holds a set of other options or another source "
            f"({', '.join(differing)}); choose a new or empty folder, or delete this one."
        )
