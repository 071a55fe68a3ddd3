"""What a check found on one process, and what all processes found together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum


class Verdict(IntEnum):
    """How bad it is."""

    ok = 0
    warn = 1
    fail = 2


GPU = "GPU"


@dataclass(frozen=True)
class Finding:
    """What a check found, and what to do about it unless it is fine."""

    check: str
    verdict: Verdict
    found: str
    remedy: str = ""


def ok(check: str, found: str) -> Finding:
    """Return that all is well."""
    return Finding(check, Verdict.ok, found)


def warn(check: str, found: str, remedy: str) -> Finding:
    """Return that a run would go, but not well."""
    return Finding(check, Verdict.warn, found, remedy)


def fail(check: str, found: str, remedy: str) -> Finding:
    """Return that a run would not go."""
    return Finding(check, Verdict.fail, found, remedy)


def worst(by_rank: Sequence[Sequence[Finding]], hosts: Sequence[str]) -> list[Finding]:
    """Return one finding for each check, the worst of all processes, with those named that found it.

    Every process must have made the same checks.
    """
    return [_worst(each, hosts) for each in zip(*by_rank, strict=True)]


def unfit_nodes(by_rank: Sequence[Sequence[Finding]], nodes: Sequence[str]) -> list[str]:
    """Return the nodes that a run should stay away from: where a check fails that others pass, or a GPU does not work.

    What fails everywhere is no node's fault.
    """
    unfit = set()
    for each in zip(*by_rank, strict=True):
        failing = {node for node, finding in zip(nodes, each, strict=True) if finding.verdict is Verdict.fail}
        if failing != set(nodes) or each[0].check == GPU:
            unfit |= failing
    return sorted(unfit)


def _worst(findings: Sequence[Finding], hosts: Sequence[str]) -> Finding:
    verdict = max(each.verdict for each in findings)
    ranks = [rank for rank, each in enumerate(findings) if each.verdict == verdict]
    first = findings[ranks[0]]
    if verdict is Verdict.ok or len(findings) == 1:
        return first
    more = f" and {len(ranks) - 1} more" if len(ranks) > 1 else ""
    found = f"process {ranks[0]} on {hosts[ranks[0]]}{more}: {first.found}"
    return Finding(first.check, verdict, found, first.remedy)


def table(findings: Sequence[Finding]) -> str:
    """Return the findings as lines, and a line with the remedy below each that has one."""
    width = max(len(each.check) for each in findings)
    lines = []
    for each in findings:
        lines.append(f"{each.verdict.name:<4}  {each.check:<{width}}  {each.found}")
        if each.remedy:
            lines.append(f"{'':<4}  {'':<{width}}  -> {each.remedy}")
    return "\n".join(lines)
