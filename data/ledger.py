"""What an interrupted `coldpress shard` leaves to the next one: its plan and a record of every shard.

The ledger is a folder in the output. It is there from the first byte until after the manifest, so that an
output is either finished (manifest), unfinished (ledger), or not ours.
"""

import fcntl
import hashlib
import json
import os
import shutil
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from data.manifest import LEDGER_NAME, MANIFEST_NAME, Shard
from data.pack import PackedShard
from data.publishing import remove_temporaries, write_atomically


class Ledger:
    """Own an unfinished output, for one command at a time: ``with Ledger(output, plan) as ledger``.

    Entering raises ValueError when the output holds anything but a set of the same plan.
    """

    def __init__(self, output: Path, plan: dict[str, Any]) -> None:
        self.output = output
        self.folder = output / LEDGER_NAME
        self.plan = plan

    def __enter__(self) -> "Ledger":
        try:
            self._refuse_strangers()
            self._lock = self._locked_folder()
            try:
                self._take()
            except BaseException:
                os.close(self._lock)
                raise
        except BlockingIOError:
            raise ValueError(
                f"shard.output: another command is writing to {self.output}; wait for it, or stop it."
            ) from None
        except OSError as error:
            raise ValueError(
                f"shard.output: cannot write to {self.output} ({error.strerror}); choose another folder."
            ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # the next command tries again
            self._tidy()
        os.close(self._lock)

    def record(self, packed: PackedShard) -> None:
        """Remember a written shard."""
        self._write(_record_name(packed.shard.name), asdict(packed))

    def recall(self, shard_name: str) -> PackedShard | None:
        """Return the record of a shard written by an earlier command, if there is one and it can be read."""
        fields = self._read(_record_name(shard_name))
        if fields is None:
            return None
        shard = Shard(**fields.pop("shard"))
        rejected = [(name, reason) for name, reason in fields.pop("rejected")]
        return PackedShard(shard, rejected, **fields)

    def discard(self) -> None:
        """Remove the ledger, of a set that is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _refuse_strangers(self) -> None:
        ours = self.folder.exists() or (self.output / MANIFEST_NAME).exists()
        if not ours and self.output.exists() and any(self.output.iterdir()):
            raise ValueError(f"shard.output: {self.output} is not empty; choose a new or empty folder.")

    def _locked_folder(self) -> int:
        """Return a descriptor of the folder, which holds its lock."""
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = _lock(self.folder)
            if lock is not None:
                return lock

    def _take(self) -> None:
        self._tidy()
        held = self._read("plan")
        if held is None:
            # Without its plan nothing tells what an earlier command was to write: all of it is written again.
            for record in self.folder.iterdir():
                record.unlink()
            self._write("plan", self.plan)
        refuse_other_plan(self.output, held or self.plan, self.plan)

    def _tidy(self) -> None:
        for directory in (self.output, self.folder):
            remove_temporaries(directory)

    def _write(self, name: str, fields: dict[str, Any]) -> None:
        content = json.dumps(fields).encode("ascii")
        write_atomically(self.folder / name, _checksum(content) + b"\n" + content)

    def _read(self, name: str) -> dict[str, Any] | None:
        """Return what was written under a name, None unless it is there, byte for byte."""
        try:
            checksum, _, content = (self.folder / name).read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        fields: dict[str, Any] | None = json.loads(content) if _checksum(content) == checksum else None
        return fields


def _lock(folder: Path) -> int | None:
    """Return a descriptor that locks a folder; None of one that a command, having finished, has just removed."""
    with suppress(FileNotFoundError), ExitStack() as undo:
        descriptor = os.open(folder, os.O_RDONLY)
        undo.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), folder.stat()):
            undo.pop_all()
            return descriptor
    return None


def _record_name(shard_name: str) -> str:
    return f"{shard_name}.record"


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode("ascii")


def refuse_other_plan(output: Path, held: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raise ValueError, naming what differs, unless both plans are the same."""
    differing = [_difference(name, held.get(name)) for name in asked if held.get(name) != asked[name]]
    if differing:
        raise ValueError(
            f"shard.output: {output} holds a set of other options or another source "
            f"({', '.join(differing)}); choose a new or empty folder, or delete this one."
        )


def _difference(name: str, held: object) -> str:
    if name == "source_fingerprint":
        return f"{name}: not the names, labels, sizes and times of the source's images"
    return f"{name}={held}"
