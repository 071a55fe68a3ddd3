"""Numbers as people read them."""

from __future__ import annotations

import math

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k"))


def amount(number: float) -> str:
    """Return a count in at most four digits and a prefix: 950, 12.3k, 1.54M."""
    if not math.isfinite(number):
        return "-"
    for size, prefix in _PREFIXES:
        if abs(number) >= size:
            # From ten thousand on in thousands, which have a prefix of their own.
            scale = 1e3 if prefix == "k" else size
            return f"{number / scale:.4g}{prefix}" if abs(number) / scale < 1000 else f"{number / scale:.0f}{prefix}"
    return f"{number:,.4g}" if abs(number) < 1000 else f"{number:,.0f}"


def percent(share: float | None) -> str:
    """Return a share in percent."""
    return "-" if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def factor(ratio: float | None) -> str:
    """Return how many times, for instance 1.75 x."""
    return "-" if ratio is None or not math.isfinite(ratio) else f"{ratio:.2f} x"


def time_unit(seconds: float) -> tuple[str, float]:
    """Return the unit in which a length of time is a number of some digits, and its seconds."""
    return ("h", 3600.0) if seconds >= 7200 else ("min", 60.0) if seconds >= 120 else ("s", 1.0)


def seconds_text(seconds: float | None) -> str:
    """Return a length of time: 12.3 s, 4 min 30 s, 3 h 20 min."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min"
