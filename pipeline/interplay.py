"""Where compression and freezing meet: a layer that freezes early may never have seen an image whole."""

from __future__ import annotations

import logging
import math

from pipeline.compression import CompressionSchedule, FittedAdaptive
from pipeline.freezing import FreezeOut, FreezeSchedule
from pipeline.schedules import Schedules

log = logging.getLogger(__name__)


def whole_from(schedule: CompressionSchedule, image_size: int, patch_size: int) -> float:
    """Return the progress from which on images have come in the model's own patches, and without dropout.

    Not necessarily at once; infinite if one of them never comes, or nobody can say beforehand.
    """
    if isinstance(schedule, FittedAdaptive):
        return math.inf
    own, undropped = math.inf, math.inf
    for progress in reversed([0.0, *schedule.changes()]):
        query = schedule.at(progress)
        count = query.num_patches(image_size, patch_size)
        if query.patch_size(patch_size) == patch_size:
            own = progress
        if query.keep(count) == count:
            undropped = progress
    return max(own, undropped)


def check_waiting(schedule: CompressionSchedule, freeze: FreezeSchedule) -> None:
    """Raise ValueError for layers that are to wait for what nobody can say when it comes."""
    if isinstance(schedule, FittedAdaptive) and isinstance(freeze, FreezeOut) and freeze.see_whole is not None:
        raise ValueError(
            f"freeze.see_whole={freeze.see_whole:g} asks when compression ends, which compression=adaptive decides "
            "while it trains; leave freeze.see_whole out, or take compression=staged."
        )


def warn_of_early_freezing(schedules: Schedules) -> None:
    """Say which layers freeze before they have seen an image whole."""
    early = [progress for progress in schedules.freezes() if progress <= schedules.whole_from]
    if not early:
        return
    if isinstance(schedules.compression, FittedAdaptive):
        when = "may not have come by then: compression=adaptive decides while it trains"
    elif math.isinf(schedules.whole_from):
        when = "never come in this run; evaluation sees nothing else"
    else:
        when = f"come from {schedules.whole_from:.1%} of the budget on; freeze.see_whole=0.05 lets them wait"
    log.warning(
        "%d layers freeze from %.1f%% of the budget on, but images in the model's own patches and without dropout %s",
        len(early),
        100 * early[0],
        when,
    )
