"""The harness held against runs with a known defect: a check that cannot fail is none."""

from __future__ import annotations

import signal
from random import Random

from chaos.chain import UNDISTURBED, Chain
from chaos.events import STOPPED, Ending
from chaos.life import Life
from chaos.run_files import RunFiles
from chaos.tiny_run import STEPS
from chaos.verdict import Reference


def notices(chain: Chain, reference: Reference) -> bool:
    """Interrupt a sabotaged run once and tell whether anything is found to differ."""
    draw = Random(0)
    finished = chain.live("half-way", Ending(_stop_half_way, (STOPPED,)), draw, reference)
    assert not finished, "stopped too late to be resumed"
    chain.live("undisturbed", UNDISTURBED, draw, reference)
    chain.judge_the_end(reference)
    return bool(chain.tally.differences)


def _stop_half_way(life: Life, files: RunFiles, draw: Random) -> None:
    life.wait_for_step(STEPS // 2)
    life.send(signal.SIGTERM)
