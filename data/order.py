"""Which sample is at which place of the run.

The run is one endless sequence of places. Which sample lies at a place is a pure function of (seed, place),
so the state of the data in a run is one integer, whatever the number of ranks. Nothing here holds random
state: every draw is a counter-based hash, the same on every machine and with every version of numpy.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
VERSION = 2
"""Of the sequence: a run that another version began cannot go on."""

# Numbers of ranks are powers of two as a rule. Any change here is a new version.
_MOST_LANES = 64
_SHARDS_PER_LANE = 4  # at least, for a lane shorter than a shard would hardly be mixed
_SHARDS_MIXED = 32  # at least, in all lanes' windows together
_LEAST_WINDOW = 2

# Separate the hashes of shards, of samples and of what is held out from each other and from those of the views.
_SHARDS, _SAMPLES, _HELD_OUT = 0x736861726473, 0x73616D706C65, 0x68656C64206F7574


def hashed(*words: int | NDArray[np.int64]) -> NDArray[np.uint64]:
    """Fold integers or broadcastable integer arrays into 64-bit hashes; scalars alone give shape [1].

    Each word passes through the finalizer of splitmix64 (Steele, Lea and Flood, OOPSLA 2014).
    """
    state = np.zeros(1, np.uint64)
    for word in words:
        state = _mixed((state ^ _unsigned(word)) + _GAMMA)
    return state


def uniforms(keys: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """Draw ``count`` numbers in [0, 1) from each key: keys [n] -> float64 [n, count]."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * _GAMMA
    return (_mixed(keys[:, None] + steps) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _unsigned(word: int | NDArray[np.int64]) -> NDArray[np.uint64]:
    if isinstance(word, np.ndarray):
        return word.astype(np.uint64)
    return np.array([int(word) & 0xFFFF_FFFF_FFFF_FFFF], np.uint64)


def _mixed(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply splitmix64's finalizer. Arrays, not scalars: numpy warns of a scalar's wanted overflow."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


class Order(Protocol):
    """Assigns a sample to every place of a run."""

    def __len__(self) -> int:
        """Return the number of samples in an epoch."""
        ...

    def place(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Map global sample indices [n] to (epoch [n], sample id [n])."""
        ...


class ShuffledOrder:
    """An endless run in which every epoch is a new permutation of the set.

    Global index g lies in epoch g // N at position g % N. An epoch permutes the shards and cuts their sequence
    into lanes of equal length, up to one sample; a lane mixes its samples inside windows of consecutive shards;
    position p is the next sample of lane p % lanes. Rank r of R takes the places with g % R == r: where R divides
    the lanes it reads the shards of lanes / R of them, near-sequentially, and where it does not, ranks share lanes.
    The sequence itself knows nothing of ranks.

    ``counts``: samples per shard. ``lanes`` grows with the number of shards, to 64.
    """

    def __init__(self, counts: Sequence[int], seed: int) -> None:
        assert sum(counts) > 0, counts
        self.seed = seed
        self.counts = np.asarray(counts, np.int64)
        most = max(1, min(_MOST_LANES, len(self.counts) // _SHARDS_PER_LANE))
        self.lanes = 1 << (most.bit_length() - 1)
        self.window = max(_LEAST_WINDOW, _SHARDS_MIXED // self.lanes)
        self._permutations: dict[int, NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return int(self.counts.sum())

    def place(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Map global sample indices [n] to (epoch [n], sample id [n]); they may span any number of epochs."""
        epoch, position = np.divmod(index, len(self))
        sample = np.empty_like(position)
        for each in np.unique(epoch):
            here = epoch == each
            sample[here] = self.permutation(int(each))[position[here]]
        return epoch, sample

    def permutation(self, epoch: int) -> NDArray[np.int64]:
        """Return the sample ids of an epoch in order [N], keeping only the last two epochs asked for."""
        if epoch not in self._permutations:
            near = {key: ids for key, ids in self._permutations.items() if key == epoch - 1}
            self._permutations = {**near, epoch: self._draw(epoch)}
        return self._permutations[epoch]

    def _draw(self, epoch: int) -> NDArray[np.int64]:
        shards = np.argsort(hashed(_SHARDS, self.seed, epoch, np.arange(len(self.counts))), kind="stable")
        ids, shard_position = self._in_sequence(shards)
        lane = np.repeat(np.arange(self.lanes), np.diff(self._lane_starts()))
        # A lane's windows begin where the lane does; its first shard may have begun in the lane before.
        first_shard = shard_position[np.minimum(self._lane_starts()[:-1], len(self) - 1)]
        window = (shard_position - first_shard[lane]) // self.window
        mixed = np.lexsort((hashed(_SAMPLES, self.seed, epoch, ids), window, lane))
        return ids[mixed][self._dealt()]

    def _in_sequence(self, shards: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the ids of all samples, shard after shard, and the position [N] of each one's shard."""
        counts = self.counts[shards]
        first_ids = (np.cumsum(self.counts) - self.counts)[shards]
        starts = np.cumsum(counts) - counts
        return np.arange(len(self)) + np.repeat(first_ids - starts, counts), np.repeat(np.arange(len(shards)), counts)

    def _lane_starts(self) -> NDArray[np.int64]:
        """Return where the lanes begin in the sequence, and its end: [lanes + 1]; the first ones get the rest."""
        each, rest = divmod(len(self), self.lanes)
        lanes = np.arange(self.lanes + 1)
        return lanes * each + np.minimum(lanes, rest)

    def _dealt(self) -> NDArray[np.int64]:
        """Return, for every position [N], where its sample lies when the lanes stand one after the other."""
        turn, lane = np.divmod(np.arange(len(self)), self.lanes)
        return self._lane_starts()[lane] + turn


class SubsetOrder:
    """An endless run over some of the samples of a set, in the order in which a shuffled run has them.

    ``ids``: those samples, each once, in any order.
    """

    def __init__(self, whole: ShuffledOrder, ids: ArrayLike) -> None:
        self._whole = whole
        self._taken = np.zeros(len(whole), bool)
        self._taken[np.asarray(ids, np.int64)] = True
        self._size = int(self._taken.sum())

    def __len__(self) -> int:
        return self._size

    def place(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Map global sample indices [n] to (epoch [n], sample id [n]); they may span any number of epochs."""
        epoch, position = np.divmod(index, len(self))
        sample = np.empty_like(position)
        for each in np.unique(epoch):
            here, permutation = epoch == each, self._whole.permutation(int(each))
            sample[here] = permutation[self._taken[permutation]][position[here]]
        return epoch, sample


def held_out(samples: int, share: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the ids of a set's samples that may be learned from, and those held out, both in a random order.

    The same ones for every run, whatever its seed.
    """
    order = np.argsort(hashed(_HELD_OUT, np.arange(samples)), kind="stable")
    count = int(samples * share)
    return order[count:], order[:count]


class FixedOrder:
    """The given sample ids once, in that order, all in epoch 0: for evaluation."""

    def __init__(self, ids: ArrayLike) -> None:
        self._ids = np.asarray(ids, np.int64)

    def __len__(self) -> int:
        return len(self._ids)

    def place(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Map indices [n] below ``len(self)`` to (zeros [n], sample id [n])."""
        return np.zeros_like(index), self._ids[index]
