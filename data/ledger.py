"""What an interrupted `coldpress shard` leaves to the next one: its plan and a record of every shard.

The ledger is a folder in the output. It is there from the first byte until after the manifest, so that an
output is either finished (manifest), unfinished (ledger), or not ours. Processes that share the work, on whatever
nodes, meet in it and nowhere else: a record is a file of its own, and has the same bytes whoever writes it.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from data.deal import Part
from data.locks import HERE, PartLock
from data.manifest import LEDGER_NAME, MANIFEST_NAME, Shard
from data.pack import PackedShard
from data.publishing import remove_temporaries, write_atomically

_LEASE = 120.0  # seconds until a file server has forgotten the locks of a node that is gone; 90 is usual
_WHOLE = Part()
_PLAN = "plan"


class Ledger:
    """Own a part of an unfinished output: ``with Ledger(output, plan, part) as ledger``.

    Entering raises ValueError when the output holds anything but a set of the same plan, and while another command
    writes this part of it or one of another division.
    """

    def __init__(self, output: Path, plan: dict[str, Any], part: Part = _WHOLE) -> None:
        self.output = output
        self.folder = output / LEDGER_NAME
        self.plan = plan
        self.part = part
        self._lock = PartLock(self.folder, part)
        self._finished = False

    def __enter__(self) -> "Ledger":
        try:
            self._refuse_strangers()
            self._enter()
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
        self._lock.release()
        if self._finished:
            # Not earlier: in place of a removed file that is open NFS leaves another one, and with it the folder.
            shutil.rmtree(self.folder, ignore_errors=True)

    def record(self, packed: PackedShard) -> None:
        """Remember a written shard."""
        self._write(_record_name(packed.shard.name), asdict(packed))

    def recall(self, shard_name: str) -> PackedShard | None:
        """Return the record of a shard that a command of this plan wrote, if there is one and it can be read."""
        fields = self._read(_record_name(shard_name))
        if fields is None:
            return None
        shard = Shard(**fields.pop("shard"))
        rejected = [(name, reason) for name, reason in fields.pop("rejected")]
        return PackedShard(shard, rejected, **fields)

    @contextmanager
    def part_finished(self) -> Iterator[list[int]]:
        """Mark this part as finished, and yield, alone with the ledger, the numbers of the parts that are not.

        Just one of several that finish together finds none left. It does where locks do not hold between nodes, too,
        though then it may be more than one: each marks before it looks.
        """
        with self._lock.alone():
            self._write(self._mark(self.part.number), {})
            yield [number for number in range(1, self.part.parts + 1) if self._read(self._mark(number)) is None]

    def discard(self) -> None:
        """Remove the ledger, of a set that is finished, on leaving it."""
        self._finished = True

    def _refuse_strangers(self) -> None:
        # One look, not several: other parts may be making the ledger at this moment.
        found = os.listdir(self.output) if self.output.exists() else []
        if found and LEDGER_NAME not in found and MANIFEST_NAME not in found:
            raise ValueError(f"shard.output: {self.output} is not empty; choose a new or empty folder.")

    def _enter(self) -> None:
        """Take the part, or wait for it as long as its holder may be one that was lost with its node."""
        deadline = None
        while host := self._taken_by():
            if host == HERE or (deadline is not None and time.monotonic() > deadline):
                raise ValueError(
                    f"shard.output: another command is writing to {self.output}, on {host}; wait for it, or stop it."
                )
            if deadline is None:
                deadline = time.monotonic() + _LEASE
                print(f"{self.output} is locked on {host}; waiting {_LEASE:.0f} s, in case that is lost", flush=True)
            time.sleep(1)

    def _taken_by(self) -> str:
        """Take the part and return nothing, or return the host of who has it."""
        with self._lock.alone():
            host = self._lock.acquire()
            if not host:
                try:
                    self._begin()
                except BaseException:
                    self._lock.release()
                    raise
        return host

    def _begin(self) -> None:
        held = self._read(_PLAN)
        if held is None:
            self._write(_PLAN, self.plan)
        refuse_other_plan(self.output, held or self.plan, self.plan, self.part)
        self._tidy()
        (self.folder / self._mark(self.part.number)).unlink(missing_ok=True)

    def _tidy(self) -> None:
        """Remove what killed processes left half-written of this part's shards; what other parts write stays."""
        for directory in (self.output, self.folder):
            remove_temporaries(directory, self._is_wanted)

    def _is_wanted(self, name: str) -> bool:
        shard = re.search(r"-(\d+)\.(?:tar|idx)\.", name)
        return self._finished or (shard is not None and self.part.has(int(shard[1])))

    def _mark(self, number: int) -> str:
        return f"finished-{number}-of-{self.part.parts}"

    def _write(self, name: str, fields: dict[str, Any]) -> None:
        content = json.dumps(fields).encode("ascii")
        write_atomically(self.folder / name, self._seal(name, content) + b"\n" + content)

    def _read(self, name: str) -> dict[str, Any] | None:
        """Return what a command of this plan wrote under a name, None unless it is there, byte for byte."""
        try:
            seal, _, content = (self.folder / name).read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        fields: dict[str, Any] | None = json.loads(content) if self._seal(name, content) == seal else None
        return fields

    def _seal(self, name: str, content: bytes) -> bytes:
        """Return a checksum, of all but a plan one that no other plan has."""
        plan = b"" if name == _PLAN else json.dumps(self.plan, sort_keys=True).encode("ascii")
        return hashlib.sha256(plan + content).hexdigest().encode("ascii")


def _record_name(shard_name: str) -> str:
    return f"{shard_name}.record"


def refuse_other_plan(output: Path, held: dict[str, Any], asked: dict[str, Any], part: Part = _WHOLE) -> None:
    """Raise ValueError, naming what differs, unless both plans are the same."""
    differing = [_difference(name, held.get(name), part) for name in asked if held.get(name) != asked[name]]
    if differing:
        remedy = "" if part == _WHOLE else "give all parts the same words and one source that no longer changes, or "
        raise ValueError(
            f"shard.output: {output} holds a set of other options or another source "
            f"({', '.join(differing)}); {remedy}choose a new or empty folder, or delete this one."
        )


def _difference(name: str, held: object, part: Part) -> str:
    if name == "source_fingerprint":
        seen = "" if part == _WHOLE else f" that {part} sees"
        return f"{name}: not the names, labels, sizes and times of the source's images{seen}"
    return f"{name}={held}"
