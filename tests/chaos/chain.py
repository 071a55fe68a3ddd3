"""A chain: one run directory, driven from life to life through drawn events until its run has finished."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from chaos.events import CHANGES, ENDINGS, Condition, Ending, let_be
from chaos.life import Life, Setting
from chaos.recorded_train import Witness
from chaos.run_files import RunFiles
from chaos.small_disk import SmallDisk
from chaos.tiny_run import words_of
from chaos.verdict import Reference, end_wrong, ended_wrong, samples_wrong, steps_missing

UNDISTURBED = Ending(let_be, codes=())
_MOST_ENDINGS = 8
_MOST_CHANGES = 2


@dataclass
class Tally:
    """What happened, and what came out that should not."""

    counts: Counter[str] = field(default_factory=Counter)
    deaths: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Add what happened to another chain."""
        self.counts.update(other.counts)
        self.deaths.update(other.deaths)
        self.changes.update(other.changes)
        self.differences += other.differences


class Chain:
    """One run and its lives; everything is below `directory`."""

    def __init__(
        self, directory: Path, shards: Path, ranks: int, *, small_disk: bool = False, sabotage: str = ""
    ) -> None:
        directory.mkdir(parents=True)
        self._directory, self._shards, self._sabotage = directory, shards, sabotage
        self._disk = SmallDisk(directory / "runs") if small_disk else None
        self._condition = Condition(ranks)
        self._lives: list[Life] = []
        self._modes: set[tuple[int, str]] = set()
        self.files = RunFiles(directory / "runs", self._disk)
        self.networks = directory / "networks.pt"
        self.tally = Tally(Counter(chains=1))

    def drive(self, draw: Random, kinds: Collection[str], reference: Reference) -> None:
        """Let lives end as drawn until the run has finished, then compare it with the uninterrupted one."""
        endings = [kind for kind in ENDINGS if kind in kinds and self._offers(ENDINGS[kind])]
        for _ in range(draw.randint(_MOST_ENDINGS // 2, _MOST_ENDINGS)):
            kind = draw.choice(endings)
            if self.live(kind, ENDINGS[kind], draw, reference):
                break
            self._change(draw, kinds)
        else:
            self.live("undisturbed", UNDISTURBED, draw, reference)
        self.judge_the_end(reference)

    def live(self, kind: str, ending: Ending, draw: Random, reference: Reference) -> bool:
        """Live one life and judge it; tell whether the run has finished."""
        resumes_at = self.files.resumes_at()
        with ending.circumstances(self.files, self._condition, draw):
            life = self.start()
            ending.strike(life, self.files, draw)
            in_time = life.end()
        finished = not any(life.codes.values())
        self._count(kind, life, resumes_at, finished)
        wrongs = [*ended_wrong(life, ending), *samples_wrong(life, resumes_at, reference)]
        self._differ(f"life {life.number} ({kind})", wrongs if in_time else ["hangs", *wrongs])
        self._condition.clock_hours = 0.0
        return finished

    def start(self, *, anew: bool = False) -> Life:
        """Start the next life."""
        condition = self._condition
        witness = Witness("", str(self.networks), condition.clock_hours, condition.sync_seconds, self._sabotage)
        words = words_of(self.files.runs, self._shards, condition.engine)
        self._modes.add((condition.ranks, condition.engine))
        self._lives.append(Life(len(self._lives) + 1, self._directory, Setting(words, condition.ranks, witness, anew)))
        return self._lives[-1]

    def judge_the_end(self, reference: Reference) -> None:
        """Compare what the lives did together with the uninterrupted run."""
        exact = len(self._modes) == 1
        wrongs = [*steps_missing(self._lives), *end_wrong(self.networks, self.files, reference, exact=exact)]
        self._differ("end", wrongs)

    def close(self) -> None:
        """Give the disk back."""
        if self._disk is not None:
            self._disk.close()

    def _offers(self, ending: Ending) -> bool:
        return self._disk is not None or not ending.needs_disk

    def _change(self, draw: Random, kinds: Collection[str]) -> None:
        possible = [kind for kind in CHANGES if kind in kinds]
        for kind in draw.sample(possible, k=min(len(possible), draw.randint(0, _MOST_CHANGES))):
            if CHANGES[kind](self.files, self._condition, draw):
                self.tally.changes[kind] += 1

    def _count(self, kind: str, life: Life, resumes_at: int, finished: bool) -> None:
        counts = self.tally.counts
        counts["lives"] += 1
        counts["resumes"] += resumes_at > 0
        if not finished:
            self.tally.deaths[kind] += 1
            counts["half a checkpoint left"] += self.files.saving(since=life.began)
            # If it is older, a change between lives took its name.
            counts["a checkpoint not named yet"] += self.files.unnamed() and self.files.resumes_at() > resumes_at
            counts["a survivor that waited"] += life.stayed

    def _differ(self, when: str, wrongs: list[str]) -> None:
        self.tally.differences += [f"{self._directory.name}, {when}: {wrong}" for wrong in wrongs]
