"""Many chains, and a table of what became of them.

PYTHONPATH=tests python -m chaos.campaign --at DIR [--deaths 200 | --chains 3] [--seed 0] [--kinds kill_all flip]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from random import Random

from chaos.chain import Chain, Tally
from chaos.events import CHANGES, ENDINGS, KINDS
from chaos.sabotage import SABOTAGES
from chaos.self_check import notices
from chaos.small_disk import own_mounts
from chaos.verdict import Reference, pixels_of
from chaos.warm import warm_up

from data.drawn import draw_image_folder

_RANKS = (1, 2)


class Campaign:
    """Chains over one set of shards, each held against the uninterrupted run with as many processes."""

    def __init__(self, directory: Path, seed: str, kinds: list[str]) -> None:
        self._directory, self._seed = directory, seed
        self._kinds, self._small_disk_each = _possible(kinds)
        self._shards = _drawn_shards(directory)
        self._references: dict[int, Reference] = {}
        self.tally = Tally()

    def run_chain(self) -> Tally:
        """Drive one more chain to its end; which events come is a function of the seed and of its number."""
        number = self.tally.counts["chains"] + 1
        draw = Random(f"{self._seed}/{number}")
        ranks = draw.choice(_RANKS)
        small_disk = self._small_disk_each > 0 and number % self._small_disk_each == 0
        chain = Chain(self._directory / f"chain-{number:03d}", self._shards, ranks, small_disk=small_disk)
        try:
            chain.drive(draw, self._kinds, self._reference(ranks))
        finally:
            chain.close()
        self.tally.add(chain.tally)
        return chain.tally

    def unnoticed(self) -> list[str]:
        """Return the known defects that pass for a sound run."""
        chains = {
            name: Chain(self._directory / name.replace(" ", "-"), self._shards, 1, sabotage=name) for name in SABOTAGES
        }
        return [name for name, chain in chains.items() if not notices(chain, self._reference(1))]

    def _reference(self, ranks: int) -> Reference:
        """Return the uninterrupted run, in interpreters of its own: forked lives must not differ from it."""
        if ranks not in self._references:
            chain = Chain(self._directory / f"reference-{ranks}", self._shards, ranks)
            life = chain.start(anew=True)
            assert life.end(), "the uninterrupted run hangs"
            assert not any(life.codes.values()), life.log_of(0).read_text()
            self._references[ranks] = Reference(chain.networks, chain.files.losses(), pixels_of(life))
        return self._references[ranks]


def _possible(kinds: list[str]) -> tuple[list[str], int]:
    """Return the kinds that this machine can do, and of how many chains one gets a small disk, 0 for none."""
    endings = [kind for kind in kinds if kind in ENDINGS]
    on_disk = [kind for kind in endings if ENDINGS[kind].needs_disk]
    reason = own_mounts() if on_disk else ""
    if reason:
        print(f"left out: {', '.join(on_disk)} ({reason})")
        return [kind for kind in kinds if kind not in on_disk], 0
    # A small disk is memory, which syncs in no time: the others are on a real one, as far as they can.
    return kinds, (1 if len(on_disk) == len(endings) else 2) if on_disk else 0


def _drawn_shards(directory: Path) -> Path:
    images, shards = directory / "images", directory / "shards"
    draw_image_folder(images, classes=4, per_class=12, size=48)
    # Not in this process: sharding has threads.
    words = [f"source={images}", f"output={shards}", "samples_per_shard=10", "workers=1"]
    subprocess.run([sys.executable, "-m", "pipeline.cli", "shard", *words], check=True, capture_output=True)
    return shards


def table(tally: Tally) -> str:
    """Return what happened."""
    counts = dict(tally.counts)
    rows = [
        *((name, counts.pop(name, 0)) for name in ("chains", "lives", "resumes")),
        ("deaths", sum(tally.deaths.values())),
        *((f"  by {kind}", tally.deaths[kind]) for kind in ENDINGS if tally.deaths[kind]),
        *((f"  {found}", number) for found, number in sorted(counts.items())),
        ("changes between lives", sum(tally.changes.values())),
        *((f"  {kind}", tally.changes[kind]) for kind in CHANGES if tally.changes[kind]),
        ("differences", len(tally.differences)),
    ]
    return "\n".join([*(f"{name:<32}{number:>6}" for name, number in rows), *tally.differences])


def main() -> int:
    """Run the campaign that the command line asks for; return 1 if anything came out that should not."""
    options = _options()
    began = time.monotonic()
    options.at.mkdir(parents=True)
    campaign = Campaign(options.at, options.seed, options.kinds)
    warm_up()
    unnoticed = campaign.unnoticed()
    print("".join(f"a run that was made to {name} passes for a sound one\n" for name in unnoticed), end="")
    tally = campaign.tally
    while tally.counts["chains"] < options.chains or sum(tally.deaths.values()) < options.deaths:
        chain = campaign.run_chain()
        said = f"chain {tally.counts['chains']}: {chain.counts['lives']} lives"
        print(said, *chain.differences, sep="\n  ", flush=True)
    print(table(tally), f"in {time.monotonic() - began:.0f} s", sep="\n")
    return 1 if tally.differences or unnoticed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", type=Path, required=True, help="a new directory; kept, to look at what differs")
    parser.add_argument("--chains", type=int, default=0, help="at least so many")
    parser.add_argument("--deaths", type=int, default=0, help="at least so many")
    parser.add_argument("--seed", default="0", help="of the events; moments within a life are the machine's")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, metavar="KIND")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
