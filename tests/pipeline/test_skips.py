"""Steps that changed nothing: said once each, and fatal in a row."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.engine import StepResult
from pipeline.preemption import ProcessFailedError
from pipeline.skips import SkippedSteps

GOOD = StepResult(torch.tensor(1.5), {}, applied=True)
BAD = StepResult(torch.tensor(float("nan")), {}, applied=False)


def test_an_isolated_skip_is_said_once_with_its_step(
    tmp_path: Path, make_batch: Callable[..., object], caplog: pytest.LogCaptureFixture
) -> None:
    skips = SkippedSteps(3, tmp_path)
    with caplog.at_level(logging.WARNING):
        for step, result in enumerate([GOOD, BAD, GOOD, GOOD], start=1):
            skips.watch(step, result, make_batch())
    assert caplog.messages == [
        "step 2 changed nothing: its loss or gradient is not finite (1 in a row of at most 3)",
    ]
    assert not list(tmp_path.iterdir())


def test_only_skips_in_a_row_end_the_run_and_leave_the_samples(
    tmp_path: Path, make_batch: Callable[..., object]
) -> None:
    skips = SkippedSteps(3, tmp_path)
    for step, result in enumerate([BAD, BAD, GOOD, BAD, BAD], start=1):
        skips.watch(step, result, make_batch(4, start=4 * step))
    sentence = r"engine\.max_skipped: .* in 3 steps in a row, the last of them step 6; .*bad_batch\.json lists"
    with pytest.raises(ProcessFailedError, match=sentence):
        skips.watch(6, BAD, make_batch(4, start=24))
    written = json.loads((tmp_path / "bad_batch.json").read_text())
    assert written == {"step": 6, "ranks": [{"rank": 0, "loss": "nan", "indices": [24, 25, 26, 27]}]}


ON_TWO = """
    from pathlib import Path
    from types import SimpleNamespace
    import torch
    from pipeline import distributed
    from pipeline.engine import StepResult
    from pipeline.preemption import ProcessFailedError
    from pipeline.skips import SkippedSteps

    world = distributed.start()
    loss = torch.tensor([1.5, float("inf")][world.rank])
    batch = SimpleNamespace(index=10 * world.rank + torch.arange(3))
    try:
        SkippedSteps(1, Path({folder!r})).watch(7, StepResult(loss, {{}}, applied=False), batch)
    except (ProcessFailedError, SystemExit) as end:
        print(type(end).__name__)
    distributed.stop()
    """


def test_the_main_process_speaks_for_all_and_lists_the_samples_of_each(
    run_ranks: Callable[..., list[str]], tmp_path: Path
) -> None:
    said = run_ranks(ON_TWO.format(folder=str(tmp_path)), 2)
    assert [each.strip().splitlines()[-1] for each in said] == ["ProcessFailedError", "SystemExit"]
    assert json.loads((tmp_path / "bad_batch.json").read_text())["ranks"] == [
        {"rank": 0, "loss": 1.5, "indices": [0, 1, 2]},
        {"rank": 1, "loss": "inf", "indices": [10, 11, 12]},
    ]
