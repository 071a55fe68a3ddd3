"""From places in the run to what DALI needs: read ahead, replace broken samples, draw the parameters."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.dali import Encoded
from data.defects import Defects
from data.order import FixedOrder, Order
from data.read_ahead import ReadAhead
from data.reader import Damage, Reader, Sample
from data.views import ViewSpec, draw

_REPLACEMENTS = 1000  # tried for one broken sample

Places = NDArray[np.int64]


@dataclass(frozen=True)
class Share:
    """What one rank makes of one global batch: places in the run, epochs, sample ids, each int64 [B]."""

    places: Places
    epoch: NDArray[np.int64]
    sample: NDArray[np.int64]


class Feed:
    """Turn this rank's places into encoded images and parameter rows, some shares ahead of their use.

    A sample that is broken is replaced by the first good one at the same place of a later global batch: a batch then
    hardly ever holds an image twice, and any number of ranks agrees on it. A fixed order takes the next good one, in a
    circle. Parameters stay those of the place.
    """

    def __init__(
        self,
        reader: Reader,
        order: Order,
        specs: Sequence[ViewSpec],
        defects: Defects,
        *,
        seed: int,
        batch_size: int,
        ahead: int,
    ) -> None:
        self._reader, self._order, self._specs, self._defects = reader, order, tuple(specs), defects
        self._seed, self._batch_size, self._ahead = seed, batch_size, ahead
        self._read_ahead = ReadAhead(reader.read)

    def encoded(self, places: Iterator[Places], handed_over: deque[Share]) -> Iterator[Encoded]:
        """Yield what DALI needs for each array of places; append its share to ``handed_over``.

        Raises ValueError when more samples are broken than may be, or the file system refuses.
        """
        waiting: deque[tuple[Share, list[Future[list[Sample | Damage]]]]] = deque()
        for each in places:
            share = Share(each, *self._order.place(each))
            waiting.append((share, self._read_ahead.start(share.sample.tolist())))
            if len(waiting) > self._ahead:
                yield self._take(waiting, handed_over)
        while waiting:
            yield self._take(waiting, handed_over)

    def samples(self, share: Share) -> list[Sample]:
        """Read a share now, broken samples replaced."""
        return self._whole(share, self._reader.read(share.sample.tolist()))

    def close(self) -> None:
        """Stop the reading threads."""
        self._read_ahead.close()

    def _take(
        self, waiting: deque[tuple[Share, list[Future[list[Sample | Damage]]]]], handed_over: deque[Share]
    ) -> Encoded:
        share, chunks = waiting.popleft()
        samples = self._whole(share, self._read_ahead.collect(chunks))
        handed_over.append(share)
        return self._encode(share, samples)

    def _whole(self, share: Share, read: list[Sample | Damage]) -> list[Sample]:
        """Replace what is broken."""
        places, ids = share.places.tolist(), share.sample.tolist()
        return [
            each if isinstance(each, Sample) and sample not in self._defects else self._replacement(place, each)
            for place, sample, each in zip(places, ids, read, strict=True)
        ]

    def _replacement(self, place: int, broken: Sample | Damage) -> Sample:
        if isinstance(broken, Damage):
            self._defects.add(broken)
        for step in range(1, _REPLACEMENTS + 1):
            if isinstance(self._order, FixedOrder):
                later = (place + step) % len(self._order)
            else:
                later = place + step * self._batch_size
            sample = int(self._order.place(np.array([later]))[1][0])
            (read,) = self._reader.read([sample])
            if isinstance(read, Damage):
                self._defects.add(read)
            elif sample not in self._defects:
                return read
        raise ValueError(f"data.shards: {_REPLACEMENTS} samples in a row are broken from place {place} on.")

    def _encode(self, share: Share, samples: list[Sample]) -> Encoded:
        heights, widths = np.array([(each.height, each.width) for each in samples]).T
        rows = tuple(
            draw(
                spec,
                seed=self._seed,
                epoch=share.epoch,
                sample=share.sample,
                view=view,
                heights=heights,
                widths=widths,
            )
            for view, spec in enumerate(self._specs)
        )
        labels = np.array([each.label for each in samples], np.int64)
        return Encoded([each.image for each in samples], rows, np.stack([share.places, labels], axis=1))
