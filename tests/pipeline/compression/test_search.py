"""Evidence about neighboring cells, and moves."""

import json
import math

import pytest

from pipeline.compression import Adaptive
from pipeline.compression.search import Comparison, Evidence, Move, Search

GRID = Adaptive(memory=0.1, evidence=2.0).fitted(240, 16)
WORSE = Comparison(1.0, 0.1)
AROUND = dict.fromkeys(GRID.neighbors(GRID.start), WORSE)


def test_evidence_is_a_weighted_mean_that_forgets() -> None:
    two = Evidence().after(Comparison(-1.0, 0.3), 0.2, 0.1).after(Comparison(3.0, 0.4), 0.3, 0.1)
    # The first comparison is one memory old: weights are 1 / e and 1.
    old = math.exp(-1)
    difference, error = two.mean()
    assert difference == pytest.approx((3.0 - old) / (1 + old))
    assert error == pytest.approx(math.hypot(0.3 * old, 0.4) / (1 + old))


def test_equal_measurements_average_out() -> None:
    evidence = Evidence()
    for _ in range(4):
        evidence = evidence.after(Comparison(-1.0, 0.6), 0.5, 0.1)
    assert evidence.mean() == pytest.approx((-1.0, 0.3))


def test_a_search_moves_to_the_neighbor_that_is_better_beyond_doubt() -> None:
    search = Search(GRID, {})
    better, surest = Comparison(-1.0, 0.45), Comparison(-0.5, 0.1)
    move = search.observe({**AROUND, (20, 0.5): better, (24, 0.25): surest}, 0.1)
    assert move == Move((24, 0.5), (24, 0.25), surest)
    assert search.cell == (24, 0.25)


@pytest.mark.parametrize("tie", [Comparison(0.0, 0.0), Comparison(-0.2, 0.1), Comparison(-0.1, 1.0)])
def test_a_tie_and_a_doubt_are_no_reason_to_move(tie: Comparison) -> None:
    search = Search(GRID, {})
    assert search.observe(dict.fromkeys(AROUND, tie), 0.1) is None
    assert search.cell == GRID.start


def test_doubt_gives_way_to_repetition() -> None:
    search = Search(GRID, {})
    seen = {**AROUND, (30, 0.5): Comparison(-0.15, 0.1)}
    moves = [search.observe(seen, 0.1) for _ in range(2)]
    assert moves[0] is None
    # 2 errors of 0.1 / sqrt(2) are below 0.15.
    assert moves[1] is not None
    assert moves[1].after == (30, 0.5)


def test_the_way_back_is_closed_by_what_led_there() -> None:
    there = {**AROUND, (30, 0.5): Comparison(-0.3, 0.1)}
    back = dict.fromkeys(GRID.neighbors((30, 0.5)), WORSE) | {(24, 0.5): Comparison(-0.3, 0.1)}
    search = Search(GRID, {})
    assert search.observe(there, 0.1) is not None
    # The mean of +0.3, as the first measurement looks from here, and -0.3.
    assert search.observe(back, 0.1) is None
    assert [search.observe(back, 0.1) is None for _ in range(3)][-1] is False
    assert search.cell == (24, 0.5)


def test_what_is_not_finite_is_forgotten() -> None:
    search = Search(GRID, {})
    before = search.numbers()
    for bad in (math.nan, -math.inf):
        assert search.observe({**AROUND, (20, 0.5): Comparison(bad, 0.1)}, 0.1) is None
        assert search.observe({**AROUND, (20, 0.5): Comparison(-1.0, bad)}, 0.1) is None
    assert search.numbers() == before


def test_numbers_go_through_json_to_the_bit() -> None:
    search = Search(GRID, {})
    search.spent = 1 / 3
    search.observe({cell: Comparison(1 / (3 + i), 0.1 / 7) for i, cell in enumerate(AROUND)}, 0.1 / 3)
    again = Search(GRID, json.loads(json.dumps(search.numbers())))
    assert again.numbers() == search.numbers()
    assert len(again.numbers()["evidence"]) == 4


def test_a_cell_of_another_grid_is_left_for_the_start() -> None:
    assert Search(GRID, {"cell": [28, 0.5]}).cell == GRID.start
