"""From tables of errors to stages: ties by hand, constraints against all assignments there are."""

import math
from collections.abc import Callable
from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.analysis.results import Analysis
from pipeline.analysis.selection import (
    Choice,
    SelectionConfig,
    best_constant,
    choose,
    estimates,
    shape,
    stages,
)
from pipeline.compression import Staged

Make = Callable[..., Analysis]
COSTS = (3.0, 1.5, 1.5, 1.0)
# Eight sub-batches: t of 7 degrees of freedom, from tables.
T_95 = 2.3646
values = st.integers(0, 5).map(float)
tables = st.integers(1, 5).flatmap(
    lambda panels: st.lists(st.lists(values, min_size=4, max_size=4), min_size=panels, max_size=panels)
)


def chosen(choices: list[Choice]) -> list[int]:
    """Return the columns of a table that were chosen."""
    return [choice.chosen.patch_size - 1 for choice in choices]


def found(analysis: Analysis, **options: object) -> list[int]:
    return chosen(choose(analysis, SelectionConfig(**({"confidence": 0.0} | options))))  # type: ignore[arg-type]


def test_a_stage_reaches_from_midpoint_to_midpoint_and_equal_neighbors_are_one(make_table: Make) -> None:
    analysis = make_table([[1, 2, 3], [2, 1, 3], [2, 1, 3], [1, 2, 3], [3, 2, 1]])
    made = stages(choose(analysis, SelectionConfig(confidence=0.0)))
    assert [(s.until, s.patch_size) for s in made] == [(0.125, 1), (0.625, 2), (0.875, 1), (1.0, 3)]
    assert [s.patch_size for s in stages(choose(make_table([[2, 1]]), SelectionConfig(confidence=0.0)))] == [2]


@given(table=tables)
def test_the_nearest_panel_decides(make_table: Make, table: list[list[float]]) -> None:
    choices = choose(make_table(table), SelectionConfig())
    schedule = Staged(stages(choices))
    for progress in (i / 97 for i in range(97)):
        nearest = min(choices, key=lambda c: abs(c.panel.progress - progress))
        assert schedule.at(progress).patch_size(16) == nearest.chosen.patch_size


@given(table=tables)
def test_without_confidence_and_constraints_every_panel_takes_its_smallest_value(
    make_table: Make, table: list[list[float]]
) -> None:
    for row, column in zip(table, found(make_table(table)), strict=True):
        assert row[column] == min(row)
        # Later columns are cheaper.
        assert column == max(j for j, value in enumerate(row) if value == min(row))


def test_differences_within_noise_are_ties_and_the_cheapest_of_them_wins(make_table: Make) -> None:
    # Columns cost 4, 3, 2, 1. Against the first, the others' difference has standard errors of 0.1, 0.1 and 0.2.
    wobbles = [x / math.sqrt(7) for x in (0, 0.1, 0.1, 0.2)]
    analysis = make_table([[1.0, 1.0 + 0.09 * T_95, 1.0 + 0.11 * T_95, 1.0 + 0.19 * T_95]], wobbles=wobbles)
    (choice,) = choose(analysis, SelectionConfig(tolerance=math.inf))
    assert (choice.best.patch_size, [c.patch_size for c in choice.ties], chosen([choice])) == (1, [1, 2, 4], [3])
    assert found(analysis, confidence=0.5) == [0]


def test_an_interval_that_overlaps_with_everything_is_no_merit(make_table: Make) -> None:
    # The cheapest is estimated to be three times as bad, and nothing is known for sure of it.
    analysis = make_table([[1.0, 1.05, 3.0]], wobbles=[0.0, 1.0, 100.0])
    assert found(analysis, confidence=0.95) == [1]
    assert found(analysis, confidence=0.95, tolerance=0.04) == [0]
    assert found(analysis, confidence=0.95, tolerance=math.inf) == [2]
    # The bound is a share of the best one's, whatever its sign.
    assert found(make_table([[-1.0, -0.95, 1.0]], wobbles=[0.0, 1.0, 100.0]), confidence=0.95) == [1]


def test_the_difference_is_paired(make_table: Make) -> None:
    # Both go up and down together by far more than they differ.
    assert found(make_table([[1.0, 1.05]], wobbles=[5.0, 5.0]), confidence=0.99) == [0]
    assert found(make_table([[1.0, 1.05]], wobbles=[5.0, -5.0]), confidence=0.99) == [1]


def test_of_ties_of_equal_cost_the_less_compressed_wins(make_table: Make) -> None:
    # The first keeps 100 query tokens, the second 101.
    assert found(make_table([[1.0, 1.0]], costs=[[2.0, 2.0]])) == [1]


def test_the_plugin_estimate_is_the_papers(make_table: Make) -> None:
    # A plug-in squared bias of 1 + value, whatever the value, but for a variance term of 0.
    analysis = make_table([[1.0, 2.0]])
    biased = estimates(analysis, plugin=True)
    assert [c.squared_bias for c in biased.panels[0].cells] == [2.0, 3.0]
    assert choose(analysis, SelectionConfig(plugin=True))[0].panel == biased.panels[0]
    assert estimates(analysis, plugin=False) is analysis


def test_monotone_gives_up_the_cheap_panel_where_that_loses_less(make_table: Make) -> None:
    # Costs 2 and 1; alone, the panels would take 0 1 0 1. Rising, 0 0 0 0 loses 5, 1 1 0 0 loses 6 and 1 1 1 1 loses 8.
    table = [[0, 5], [4, 0], [0, 3], [1, 0]]
    assert found(make_table(table)) == [0, 1, 0, 1]
    assert found(make_table(table), monotone=True) == [0, 0, 0, 0]
    # A greedy walk would take 0 first and could not leave it; 1 1 0 0 loses 2 now.
    assert found(make_table([[0, 1], *table[1:]]), monotone=True) == [1, 1, 0, 0]


def test_monotone_compares_at_one_panel_because_frozen_layers_make_every_cell_cheaper(make_table: Make) -> None:
    # The second panel's cells cost half as much: staying is no rise of compression.
    analysis = make_table([[0, 1, 2], [1, 0, 2], [2, 1, 0]], costs=[[4, 3, 2], [2, 1.5, 1], [2, 1.5, 1]])
    assert found(analysis, monotone=True) == [1, 1, 1]
    assert found(make_table([[3, 1, 0], [0, 1, 3]], costs=[[4, 3, 2], [2, 1.5, 1]]), monotone=True) == [2, 0]


@given(table=tables, cap=st.integers(0, 5), monotone=st.booleans())
def test_constraints_hold_and_nothing_that_respects_them_is_better(
    make_table: Make, table: list[list[float]], cap: int, monotone: bool
) -> None:
    def allowed(path: tuple[int, ...] | list[int]) -> bool:
        rising = all(COSTS[a] <= COSTS[b] for a, b in pairwise(path))
        # Of the two cells of equal cost a rising path may not come back to the first as to the same shape.
        shapes = 1 + sum(a != b for a, b in pairwise(path)) if monotone else len(set(path))
        return (rising or not monotone) and shapes <= (cap or len(table))

    def loss(path: tuple[int, ...] | list[int]) -> tuple[float, float, int]:
        lost = sum((row[c] - min(row)) / m for row, c, m in zip(table, path, magnitudes, strict=True))
        return lost, sum(COSTS[c] for c in path), -sum(path)

    magnitudes = [2.0**i for i in range(len(table))]
    path = found(make_table(table, [COSTS], magnitudes=magnitudes), max_shapes=cap, monotone=monotone)
    assert allowed(path)
    assert loss(path) == min(loss(each) for each in product(range(4), repeat=len(table)) if allowed(each))


def test_a_grid_of_the_papers_size_is_solved_exactly_at_once(make_papers: Make) -> None:
    analysis = make_papers((16, 20, 24, 30, 40, 48), (0.0, 0.25, 0.5, 0.75, 0.9), (0, 0.25, 0.5, 0.75, 1))
    for monotone in (False, True):
        for cap in range(1, 6):
            config = SelectionConfig(monotone=monotone, max_shapes=cap)
            assert len({shape(choice.chosen) for choice in choose(analysis, config)}) <= cap


def test_the_best_constant_minimizes_the_mean_of_normalized_errors(make_table: Make) -> None:
    # Divided by magnitudes 4 and 1: 1 + 4, 2 + 2, 4 + 1.
    assert best_constant(make_table([[4, 8, 16], [4, 2, 1]], magnitudes=[4, 1])) == (2, 0.0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"confidence": 1.0}, r"selection\.confidence must be in \[0, 1\), got 1; 0 takes the smallest estimate\."),
        ({"confidence": -0.1}, r"selection\.confidence must be in \[0, 1\), got -0\.1"),
        ({"tolerance": -0.1}, r"selection\.tolerance must be a share of at least 0, got -0\.1; 0\.1 is usual\."),
        ({"max_shapes": -1}, r"selection\.max_shapes must not be negative, got -1; 0 is no limit\."),
    ],
)
def test_what_no_selection_can_mean_is_refused(options: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SelectionConfig(**options)  # type: ignore[arg-type]
