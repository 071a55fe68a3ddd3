"""The line that a person reads while a run goes on."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from monitoring.metrics import check

log = logging.getLogger(__name__)

# A part is shown when all of its numbers are there: a probe reports one number, a log step most of them.
HEAD = "[{step:>7} {progress_ratio:6.1%}]"
PARTS = (
    "eta {eta}",
    "loss {loss:.4f}",
    "lr {learning_rate:.2e}",
    "gn {grad_norm:.2f}",
    "{samples_per_second:.0f} img/s",
    "{tokens_per_second:.0f} tok/s",
    "MFU {mfu_ratio:.1%}",
    "step {step_seconds:.3f}s",
    "data {data_wait_ratio:.1%}",
    "budget {budget_spent:.6g}/{budget_total:.6g}",
    "p={patch_size_pixels:.0f} drop={token_dropout_ratio:.2f} tok={query_tokens:.0f}/{key_tokens:.0f}",
    "frozen {frozen_layers:.0f}",
    "k-NN {knn_top1_ratio:.1%}",
    "saved in {checkpoint_seconds:.1f}s",
)


class ConsoleSink:
    """Log one line a report; on a terminal keep a progress bar below the lines."""

    def __init__(self) -> None:
        """Draw the bar; while it is there, log lines appear above it."""
        form = "{percentage:5.1f}%|{bar:20}| {desc}"
        self._bar = tqdm(total=1.0, bar_format=form, disable=None, dynamic_ncols=True, leave=False)
        self._redirection = None if self._bar.disable else logging_redirect_tqdm()
        if self._redirection:
            self._redirection.__enter__()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the numbers that there are."""
        check(metrics)
        line = summary(step, metrics)
        if not line:
            return
        log.info("%s", line)
        if "progress_ratio" in metrics:
            self._bar.n = min(1.0, metrics["progress_ratio"])
            self._bar.set_description_str(line.partition("] ")[2])

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()
        if self._redirection:
            self._redirection.__exit__(None, None, None)
            self._redirection = None


def summary(step: int, metrics: Mapping[str, float]) -> str:
    """Return the line of one report, nothing for one of which a line shows nothing."""
    shown: dict[str, object] = {**metrics, "step": step}
    if math.isfinite(eta := metrics.get("eta_seconds", math.nan)):
        shown["eta"] = timedelta(seconds=round(eta))
    head = HEAD if "progress_ratio" in metrics else "[{step:>7}]"
    parts = []
    for part in PARTS:
        with suppress(KeyError):
            parts.append(part.format_map(shown))
    return f"{head.format_map(shown)} {' | '.join(parts)}" if parts else ""
