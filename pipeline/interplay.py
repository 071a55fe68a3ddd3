"""Where compression and freezing meet: a layer that freezes early may never have seen an image whole."""

from __future__ import annotations

import logging
import math

from pipeline.compression import CompressionSchedule
from pipeline.schedules import Schedules

log = logging.getLogger(__name__)


def whole_from(schedule: CompressionSchedule, image_size: int, patch_size: int) -> float:
    """Return the progress from which on images have come in the model's own patches, and without dropout.

    Not necessarily at once; infinite if one of them never comes. An adaptive schedule is taken by where it starts.
    """
    own, undropped = math.inf, math.inf
    for progress in reversed([0.0, *schedule.changes()]):
        query = schedule.at(progress)
        count = query.num_patches(image_size, patch_size)
        if query.patch_size(patch_size) == patch_size:
            own = progress
        if query.keep(count) == count:
            undropped = progress
    return max(own, undropped)


def warn_of_early_freezing(schedules: Schedules) -> None:
    """Say which layers freeze before they have seen an image whole."""
    early = [i for i, progress in enumerate(schedules.freezes()) if progress <= schedules.whole_from]
    if not early:
        return
    never = math.isinf(schedules.whole_from)
    since = "never come in this run" if never else f"come from {schedules.whole_from:.1%} of the budget on"
    log.warning(
        "%d layers freeze from %.1f%% of the budget on, but images in the model's own patches and without dropout "
        "%s; %s",
        len(early),
        100 * schedules.freezes()[0],
        since,
        "evaluation sees nothing else" if never else "freeze.see_whole=0.05 lets them wait",
    )
