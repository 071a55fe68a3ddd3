"""Histories over lives, stages, lives and equal accuracies, against numbers worked out by hand."""

import json
import math
from pathlib import Path

import pytest

from pipeline.reports.charts import POINTS, lonely, thinned, turns
from pipeline.reports.history import Accuracy, History, read_history
from pipeline.reports.lives import BROKEN_OFF, losses, read_lives
from pipeline.reports.numbers import amount, seconds_text
from pipeline.reports.same_accuracy import Reached, reached, reached_by_all
from pipeline.reports.savings import savings

BATCH = 10


def row(
    step: int, since: int, time: float, *, cost: float = 2.0, tokens: int = 9, frozen: int = 0, **more: object
) -> dict:
    """Return the report of a life that began at step `since`, of samples at one cost."""
    samples = (step - since) * BATCH
    return {
        "step": step,
        "steps_total": step - since,
        "samples_total": samples,
        "tokens_total": tokens * samples,
        "cost_total": cost * samples,
        "uncompressed_cost_total": 4.0 * samples,
        "tuning_cost_total": 0.0,
        "skipped_steps_total": 0.0,
        "step_seconds": 2.0,
        "samples_per_second": BATCH / 2.0,
        "budget_spent": step,
        "progress_ratio": step / 100,
        "patch_size_pixels": 8,
        "token_dropout_ratio": 0.5,
        "query_tokens": tokens,
        "key_tokens": 17,
        "frozen_layers": frozen,
        "loss": 1.0,
        "time": time,
    } | more


def written(path: Path, *rows: object) -> History:
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in rows))
    return read_history(path)


def test_counters_go_on_over_lives_and_pauses_are_left_out(tmp_path: Path) -> None:
    # Saved after step 12; the report of step 15 is gone with the life that made it.
    history = written(
        tmp_path / "m",
        row(5, 0, 1000),
        row(10, 0, 1010),
        row(15, 12, 5000),
        {"knn_top1_ratio": 0.5, "step": 15, "time": 5001},
    )
    assert [p.life for p in history.points] == [0, 0, 1]
    assert [p.totals["samples_total"] for p in history.points] == [50, 100, 150]
    assert [p.totals["cost_total"] for p in history.points] == [100, 200, 300]
    # 5 steps of 2 s, 10 s by the clock, then 2 steps that no report is left of and 3 steps of 2 s each.
    assert [p.seconds for p in history.points] == [10, 20, 30]
    assert history.probes == [Accuracy(0.5, budget=15, seconds=30, samples=150, cost=300)]


def test_what_is_torn_null_or_missing_is_no_end(tmp_path: Path) -> None:
    history = written(tmp_path / "m", row(5, 0, 1000, loss=None), "[1, 2]", row(10, 0, 1010), '{"loss": 1.')
    assert math.isnan(history.curve("loss")[0])
    assert (history.damaged, len(history.points)) == (2, 2)
    assert read_history(tmp_path / "none") == History()
    assert read_history(tmp_path) == History()


def test_phases_are_those_of_all_lives(tmp_path: Path) -> None:
    first = {"phase_forward_seconds_total": 3.0, "phase_save_seconds_total": 1.0}
    rows = [row(5, 0, 1), row(10, 0, 11), row(15, 12, 99)]
    every = {f"phase_{name}_seconds_total": 0.0 for name in ("start", "data", "tune", "backward", "step", "report")}
    every |= {f"phase_{name}_seconds_total": 0.0 for name in ("probe", "end")}
    history = written(tmp_path / "m", *(r | every | first for r in rows))
    # Of the last report of each life.
    assert (history.phase_seconds["forward"], history.phase_seconds["save"]) == (6, 2)
    assert written(tmp_path / "old", *rows).phase_seconds == {}


def test_promise_and_clock_of_each_stage(tmp_path: Path) -> None:
    """Half the cost at 1.6 times the speed realizes 0.375 of the 0.5 that were promised."""
    rows, samples, cost = [], 0.0, 0.0
    for step in range(5, 45, 5):
        whole = step > 20
        samples, cost = samples + 50, cost + 50 * (4 if whole else 2)
        shape = {"tokens": 17, "token_dropout_ratio": 0.0} if whole else {"tokens": 9}
        rate = {"samples_per_second": 5.0 if whole else 8.0}
        rows.append(row(step, 0, 10.0 * step, **shape, **rate) | {"cost_total": cost})
    # The first report of a stage may have seen the one before, or a compilation.
    rows[0]["samples_per_second"] = rows[4]["samples_per_second"] = 0.1
    found = savings(written(tmp_path / "m", *rows))
    compressed, whole_stage = found.stages
    assert (compressed.begin, compressed.end, compressed.samples) == (0.0, 0.2, 200)
    assert (compressed.cost, compressed.promised) == (2.0, 2.0)
    assert (whole_stage.begin, whole_stage.promised, whole_stage.is_whole) == (0.2, 1.0, True)
    assert found.realized(compressed) == pytest.approx(1.6)
    assert found.promised == pytest.approx(400 * 4 / (200 * 2 + 200 * 4))
    assert found.seconds == pytest.approx(200 / 8 + 200 / 5)
    assert found.whole_seconds == pytest.approx(400 / 5)


def test_without_a_stage_without_compression_the_clock_says_nothing(tmp_path: Path) -> None:
    found = savings(written(tmp_path / "m", row(5, 0, 10), row(10, 0, 20), row(15, 0, 30, frozen=1, cost=1.5)))
    assert [found.realized(stage) for stage in found.stages] == [None, None]
    assert found.whole_seconds is None
    assert savings(written(tmp_path / "one", row(5, 0, 10))).stages[0].cost == 2.0
    old = {k: v for k, v in row(5, 0, 10).items() if k != "uncompressed_cost_total"}
    assert math.isnan(savings(written(tmp_path / "old", old)).promised)


LOG = """\
2026-01-01 10:00:00,000 INFO 2 process(es) on cpu on 2 node(s) (a, b)
2026-01-01 10:00:00,000 INFO starting at step 0
2026-01-01 10:00:10,000 INFO [     10  10.0%] eta 0:01:30 | loss 1.0
2026-01-01 10:00:20,000 INFO [     20  20.0%] eta 0:01:20 | loss 1.0
2026-01-01 10:00:21,500 INFO [     20] saved in 0.1s
2026-01-01 10:10:00,000 INFO 1 process(es) on cuda on node c
2026-01-01 10:10:00,000 INFO resumed at step 15
2026-01-01 10:10:05,000 INFO [     20  20.0%] eta 0:01:20 | loss 1.0
Traceback of something without a time
2026-01-01 10:10:06,000 ERROR process 1 failed at step 21: the <dog> ate it
2026-01-01 10:20:06,000 INFO 1 process(es) on cuda on node c
2026-01-01 10:20:06,000 INFO resumed at step 20
2026-01-01 10:20:16,000 INFO stopped, saved at step 30, 0.5 s after SIGTERM
"""


def test_lives_are_read_from_the_log(tmp_path: Path) -> None:
    (tmp_path / "train.log").write_text(LOG)
    lives = read_lives(tmp_path / "train.log")
    assert [(life.first_step, life.last_step, life.heard - life.began) for life in lives] == [
        (0, 20, 21.5),
        (15, 20, 6),
        (20, 30, 10),
    ]
    assert [life.machine for life in lives] == ["2 x cpu on 2 node(s) (a, b)", "cuda on node c", "cuda on node c"]
    assert [life.end for life in lives] == [
        "",
        "process 1 failed at step 21: the <dog> ate it",
        "stopped, saved at step 30, 0.5 s after SIGTERM",
    ]
    first, second = losses(lives)
    # Step 15 was done at 10:00:15, the log ends at 10:00:21.5, and the next life speaks at 10:10:00.
    assert (first.steps, first.seconds, first.pause) == (5, 6.5, 578.5)
    assert (second.steps, second.seconds, second.pause) == (0, 0, 600)
    assert read_lives(tmp_path / "none") == []
    assert "killed" in BROKEN_OFF


def probes(*accuracies: float, pace: float = 1.0) -> History:
    return History(probes=[Accuracy(a, i, 10 * pace * i, 100 * i, 7 * i) for i, a in enumerate(accuracies, start=1)])


def test_runs_are_compared_at_the_best_accuracy_that_all_reached() -> None:
    found = reached_by_all({"a": probes(0.1, 0.3, 0.2, 0.5), "b": probes(0.2, 0.4, pace=3)})
    assert found is not None
    accuracy, spent = found
    assert accuracy == 0.4
    # Between the third and the fourth probe, two thirds of the way.
    assert spent["a"] == Reached(pytest.approx(7 * 11 / 3), pytest.approx(110 / 3), pytest.approx(1100 / 3), False)
    assert spent["b"].seconds == 60
    assert reached(probes(0.6, 0.7), 0.5) == Reached(7, 10, 100, at_once=True)
    assert reached(probes(0.1), 0.5) is None
    assert reached_by_all({"a": probes(0.1), "b": probes()}) is None


def test_long_curves_are_means_of_neighbors() -> None:
    x, y = thinned(range(3 * POINTS), [1.0, 2.0, math.nan] * POINTS)
    assert (len(x), list(x[:2]), set(y)) == (POINTS, [1, 4], {1.5})
    assert math.isnan(thinned([0.0] * 2 * POINTS, [math.nan] * 2 * POINTS)[1][0])


def test_a_frozen_embedding_is_no_baseline(tmp_path: Path) -> None:
    rows = [row(step, 0, 10, cost=4.0, frozen=int(step > 10), samples_per_second=step) for step in range(5, 45, 5)]
    found = savings(written(tmp_path / "m", *rows))
    assert [stage.is_whole for stage in found.stages] == [True, False]
    assert found.whole_rate == 10


def test_numbers_between_gaps_are_marked() -> None:
    assert lonely([1, math.nan, 2, 3, math.nan, 4]) == [0, 5]
    assert lonely([1]) == [0]
    assert lonely([1, 2]) == []


def test_steps_keep_every_turn_and_both_ends() -> None:
    assert turns([0, 1, 2, 3, 4], [7, 7, 8, 8, 8]) == ([0, 2, 4], [7, 8, 8])
    assert turns([], []) == ([], [])


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (0.00021, "0.00021"),
        (950, "950"),
        (1234, "1,234"),
        (12345, "12.35k"),
        (1.5e6, "1.5M"),
        (math.nan, "-"),
    ],
)
def test_amounts(number: float, text: str) -> None:
    assert amount(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.34, "12.3 s"), (270, "4 min 30 s"), (12000, "3 h 20 min"), (math.nan, "-"), (None, "-")]
)
def test_lengths_of_time(seconds: float | None, text: str) -> None:
    assert seconds_text(seconds) == text
