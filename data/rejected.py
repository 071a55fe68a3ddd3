"""The list of images that could not become samples."""

import csv
import io
import re
from collections import Counter
from collections.abc import Sequence

REJECTED_NAME = "rejected.csv"
_HEADER = ("path", "reason")
_REASONS_SHOWN = 12

Rejected = tuple[str, str]  # path, reason


def encode_rejected(rejected: Sequence[Rejected]) -> bytes:
    """Return the file's only form: rows in order below a header."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_HEADER, *sorted(rejected)])
    return text.getvalue().encode("utf-8", "backslashreplace")  # names may be no UTF-8


def count_rejected(content: bytes) -> int:
    """Return the number of rows that were encoded."""
    return sum(1 for _ in csv.reader(io.StringIO(content.decode("utf-8"), newline=""))) - 1


def count_reasons(rejected: Sequence[Rejected]) -> list[tuple[str, int]]:
    """Return (reason, count), most frequent first; reasons that differ in numbers and names only are one."""
    counts = Counter(re.sub(r"\d+", "N", re.split(r"[:(;]| to |=", reason)[0]).strip() for _, reason in rejected)
    shown = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    others = sum(count for _, count in shown[_REASONS_SHOWN:])
    return shown[:_REASONS_SHOWN] + ([("other reasons", others)] if others else [])
