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
# Separate the hashes of shards and of samples from each other and from those of the views.
_SHARDS, _SAMPLES = 0x736861726473, 0x73616D706C65


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

    Global index g lies in epoch g // N at position g % N. An epoch permutes the shards, then mixes samples
    inside windows of ``window`` consecutive shards, so that reading stays near-sequential.
    """

    def __init__(self, counts: Sequence[int], seed: int, window: int = 16) -> None:
        assert window > 0, window
        assert sum(counts) > 0, counts
        self._seed = seed
        self._window = window
        self._shards = len(counts)
        self._shard_of_sample = np.repeat(np.arange(len(counts)), counts)
        self._permutations: dict[int, NDArray[np.int64]] = {}

    def __len__(self) -> int:
        return len(self._shard_of_sample)

    def place(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Map global sample indices [n] to (epoch [n], sample id [n]); they may span any number of epochs."""
        epoch, position = np.divmod(index, len(self))
        sample = np.empty_like(position)
        for each in np.unique(epoch):
            here = epoch == each
            sample[here] = self._permutation(int(each))[position[here]]
        return epoch, sample

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        """Return the sample ids of an epoch in order, keeping only the last two epochs asked for."""
        if epoch not in self._permutations:
            near = {key: ids for key, ids in self._permutations.items() if key == epoch - 1}
            self._permutations = {**near, epoch: self._draw(epoch)}
        return self._permutations[epoch]

    def _draw(self, epoch: int) -> NDArray[np.int64]:
        shard_keys = hashed(_SHARDS, self._seed, epoch, np.arange(self._shards))
        window_of_shard = np.empty(self._shards, np.int64)
        window_of_shard[np.argsort(shard_keys, kind="stable")] = np.arange(self._shards) // self._window
        sample_keys = hashed(_SAMPLES, self._seed, epoch, np.arange(len(self)))
        return np.lexsort((sample_keys, window_of_shard[self._shard_of_sample])).astype(np.int64)


class FixedOrder:
    """The given sample ids once, in that order, all in epoch 0: for evaluation."""

    def __init__(self, ids: ArrayLike) -> None:
        self._ids = np.asarray(ids, np.int64)

    def __len__(self) -> int:
        return len(self._ids)

    def place(self, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Map indices [n] below ``len(self)`` to (zeros [n], sample id [n])."""
        return np.zeros_like(index), self._ids[index]
