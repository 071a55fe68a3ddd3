"""What can happen to a run: how a life ends, and what changes between two. One function and one table line each."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from random import Random

from chaos.life import Life
from chaos.run_files import RunFiles
from chaos.tiny_run import STEPS

STOPPED = 75
REFUSED = (1, 2)
ENGINES = ("zero0", "zero1", "zero2", "zero3", "fsdp2")
_START_SECONDS = 1.5
_STEP_SECONDS = 0.06
_SAVE_SECONDS = 0.12
_SYNC_SECONDS = 0.004


@dataclass
class Condition:
    """Under what a life is lived."""

    ranks: int
    engine: str = "zero1"
    clock_hours: float = 0.0
    sync_seconds: float = 0.0


Strike = Callable[[Life, RunFiles, Random], None]
Circumstances = Callable[[RunFiles, Condition, Random], AbstractContextManager[None]]
Change = Callable[[RunFiles, Condition, Random], bool]


def _usual(files: RunFiles, condition: Condition, draw: Random) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Ending:
    """How a life is made to end, and with which exit codes it may, unless it finished first."""

    strike: Strike
    codes: tuple[int, ...]
    circumstances: Circumstances = _usual
    needs_disk: bool = False

    def says_why(self) -> bool:
        """Tell whether the run ends by itself, so that it owes a sentence."""
        return self.codes == REFUSED


def let_be(life: Life, files: RunFiles, draw: Random) -> None:
    """Do nothing."""


def kill_all(life: Life, files: RunFiles, draw: Random) -> None:
    """Kill all processes at any moment."""
    _wait_for_its_time(life, draw)
    life.send(signal.SIGKILL)


def kill_one(life: Life, files: RunFiles, draw: Random) -> None:
    """Kill one process at any moment; the others have to notice by themselves, or the launcher ends them."""
    _wait_for_its_time(life, draw)
    life.send(signal.SIGKILL, [draw.randrange(life.setting.ranks)])


def kill_in_save(life: Life, files: RunFiles, draw: Random) -> None:
    """Kill one process or all while a checkpoint is written, published, named or pruned."""
    _wait_for_some_step(life, draw)
    life.wait(lambda: files.saving(since=life.began))
    time.sleep(draw.uniform(0, _SAVE_SECONDS))
    everybody = list(range(life.setting.ranks))
    life.send(signal.SIGKILL, draw.choice((everybody, [draw.choice(everybody)])))


def ask(number: signal.Signals, life: Life, files: RunFiles, draw: Random) -> None:
    """Ask all processes, or only one, to save and leave."""
    _wait_for_its_time(life, draw)
    everybody = list(range(life.setting.ranks))
    life.send(number, draw.choice((everybody, [draw.choice(everybody)])))


def fill_disk(life: Life, files: RunFiles, draw: Random) -> None:
    """Take the room away while the run goes on."""
    _wait_for_its_time(life, draw)
    files.small_disk.fill(_too_little(draw))


def _too_little(draw: Random) -> int:
    """Return room for nothing, for some small files, or for part of a checkpoint."""
    return draw.choice((0, 4096 * draw.randint(1, 16), draw.randrange(1 << 21)))


def _wait_for_its_time(life: Life, draw: Random) -> None:
    """Wait for any moment of a life, of its start or of its loop."""
    if draw.random() < 0.3:
        moment = time.monotonic() + draw.uniform(0, _START_SECONDS)
    else:
        _wait_for_some_step(life, draw)
        moment = time.monotonic() + draw.uniform(0, _STEP_SECONDS)
    life.wait(lambda: time.monotonic() > moment)


def _wait_for_some_step(life: Life, draw: Random) -> None:
    life.wait_for_step(draw.randint(1, STEPS // 3))


@contextmanager
def slow_disk(files: RunFiles, condition: Condition, draw: Random) -> Iterator[None]:
    """Make saves last long enough to be hit anywhere."""
    condition.sync_seconds = _SYNC_SECONDS
    yield
    condition.sync_seconds = 0.0


@contextmanager
def full_disk(files: RunFiles, condition: Condition, draw: Random) -> Iterator[None]:
    """Leave next to no room from the start, and give it back."""
    files.small_disk.fill(_too_little(draw))
    yield
    files.small_disk.empty()


@contextmanager
def filling_disk(files: RunFiles, condition: Condition, draw: Random) -> Iterator[None]:
    """Give back the room that the life will lose."""
    yield
    files.small_disk.empty()


@contextmanager
def read_only_disk(files: RunFiles, condition: Condition, draw: Random) -> Iterator[None]:
    """Allow no writes."""
    files.small_disk.read_only(True)
    yield
    files.small_disk.read_only(False)


def jump_clock(files: RunFiles, condition: Condition, draw: Random) -> bool:
    """Have the clock on the wall jump by hours within the next life."""
    condition.clock_hours = draw.choice((-1, 1)) * draw.uniform(0.5, 30)
    return True


def damage(kind: str, files: RunFiles, condition: Condition, draw: Random) -> bool:
    """Damage the newest checkpoint."""
    return files.damage(kind, draw)


def lose_latest(files: RunFiles, condition: Condition, draw: Random) -> bool:
    """Lose the file that names the newest checkpoint."""
    return files.lose_latest(draw)


def resize(files: RunFiles, condition: Condition, draw: Random) -> bool:
    """Go on with another number of processes."""
    condition.ranks = draw.choice([ranks for ranks in (1, 2, 4) if ranks != condition.ranks])
    return True


def change_engine(files: RunFiles, condition: Condition, draw: Random) -> bool:
    """Go on at another stage of ZeRO, or without DeepSpeed."""
    condition.engine = draw.choice([engine for engine in ENGINES if engine != condition.engine])
    return True


KILLED = (-signal.SIGKILL,)
ENDINGS: dict[str, Ending] = {
    "kill_all": Ending(kill_all, KILLED),
    "kill_one": Ending(kill_one, KILLED),
    "kill_in_save": Ending(kill_in_save, KILLED, slow_disk),
    # Until the processes have met there is nothing to save, and a signal may simply end them.
    "sigterm": Ending(partial(ask, signal.SIGTERM), (STOPPED, -signal.SIGTERM)),
    "sigusr2": Ending(partial(ask, signal.SIGUSR2), (STOPPED, -signal.SIGUSR2)),
    "full_disk": Ending(let_be, REFUSED, full_disk, needs_disk=True),
    "filling_disk": Ending(fill_disk, REFUSED, filling_disk, needs_disk=True),
    "read_only_disk": Ending(let_be, REFUSED, read_only_disk, needs_disk=True),
}
CHANGES: dict[str, Change] = {
    "clock": jump_clock,
    "truncate": partial(damage, "truncate"),
    "flip": partial(damage, "flip"),
    "delete": partial(damage, "delete"),
    "latest": lose_latest,
    "resize": resize,
    "engine": change_engine,
}
KINDS = [*ENDINGS, *CHANGES]
