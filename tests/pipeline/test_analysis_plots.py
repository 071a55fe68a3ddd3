"""Pictures of an analysis: complete, legible, the same every time."""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from pipeline.analysis.results import Analysis
from pipeline.analysis.selection import Choice, SelectionConfig, choose
from pipeline.analysis_plots import _short, cost_grid, curves, draw, error_grids, path_through_grid

GRIDS = {
    "4x4": ((16, 20, 24, 30), (0.0, 0.25, 0.5, 0.75)),
    "6x5": ((16, 20, 24, 30, 40, 48), (0.0, 0.25, 0.5, 0.75, 0.9)),
}
POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)
Make = Callable[..., Analysis]


def figures(analysis: Analysis, choices: list[Choice]) -> dict[str, Figure]:
    return {
        "cost": cost_grid(analysis),
        "error": error_grids(analysis, choices),
        "path": path_through_grid(analysis, choices),
        "progress": curves(analysis, choices, 0.95),
    }


@pytest.mark.parametrize("grid", GRIDS)
def test_no_text_covers_another_one_or_leaves_the_picture(make_papers: Make, grid: str) -> None:
    analysis = make_papers(*GRIDS[grid], POINTS)
    for name, figure in figures(analysis, choose(analysis, SelectionConfig())).items():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        boxes = [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in visible(figure)]
        assert len(boxes) > 10
        for (one, here), (other, there) in combinations(boxes, 2):
            apart = here.x1 <= there.x0 or there.x1 <= here.x0 or here.y1 <= there.y0 or there.y1 <= here.y0
            assert apart, f"{name}: {one!r} and {other!r}"
        for text, box in boxes:
            assert figure.bbox.x0 - 1 <= box.x0 < box.x1 <= figure.bbox.x1 + 1, f"{name}: {text}"
            assert figure.bbox.y0 - 1 <= box.y0 < box.y1 <= figure.bbox.y1 + 1, f"{name}: {text}"


def visible(figure: Figure) -> list[Text]:
    """Return titles, labels, legends, numbers in cells and the labels of ticks within view."""
    ticks = [tick for axis in figure.axes for one in (axis.xaxis, axis.yaxis) for tick in one._update_ticks()]
    inside = [text for tick in ticks for text in (tick.label1, tick.label2)]
    others = {text for axis in figure.axes for one in (axis.xaxis, axis.yaxis) for text in one.findobj(Text)}
    labels = [one.label for axis in figure.axes for one in (axis.xaxis, axis.yaxis)]
    rest = [text for text in figure.findobj(Text) if text not in others]
    return [text for text in inside + labels + rest if text.get_visible() and text.get_text()]


def test_every_picture_is_written_twice_the_same_and_small(make_papers: Make, tmp_path: Path) -> None:
    analysis = make_papers(*GRIDS["6x5"], POINTS)
    choices = choose(analysis, SelectionConfig())
    first = draw(analysis, choices, 0.95, tmp_path / "first" / "new")
    assert sorted(path.name for path in first) == [
        f"{name}.{kind}" for name in ("cost", "error", "path", "progress") for kind in ("png", "svg")
    ]
    again = draw(analysis, choices, 0.95, tmp_path / "again")
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes()
        assert 10_000 < one.stat().st_size <= 300_000, one.name
        assert b"<dc:date>" not in one.read_bytes()


def test_error_grids_show_normalized_values_and_frame_what_was_chosen(make_papers: Make) -> None:
    analysis = make_papers(*GRIDS["4x4"], (0.0, 0.75))
    choices = choose(analysis, SelectionConfig())
    axes = np.reshape(error_grids(analysis, choices).axes[:6], (3, 2))
    for column, choice in enumerate(choices):
        panel = choice.panel
        for cell in panel.cells:
            x, y = (0.0, 0.25, 0.5, 0.75).index(cell.dropout), (30, 24, 20, 16).index(cell.patch_size)
            bias = cell.squared_bias / panel.magnitude
            variance = cell.cost / 4698 * cell.variance / panel.magnitude
            for axis, value in zip(axes[:, column], (bias + variance, bias, variance), strict=True):
                shown = next(t.get_text() for t in axis.texts if t.get_position() == (x, y))
                if value > 0:
                    assert float(shown) == pytest.approx(value, rel=0.06 if value > 1e-3 else 0.5)
                else:
                    assert shown == ("< 0" if value < 0 else "0")
        for axis in axes[:, column]:
            corners = {r.get_xy() for r in axis.patches if isinstance(r, Rectangle)}
            chosen = choice.chosen
            x, y = (0.0, 0.25, 0.5, 0.75).index(chosen.dropout), (30, 24, 20, 16).index(chosen.patch_size)
            assert corners == {(x - 0.5, y - 0.5)}
    assert "< 0" in {text.get_text() for text in axes[1, 0].texts}
    assert choices[1].chosen != choices[1].best


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (-1e-9, "< 0"),
        (0.0, "0"),
        (0.00123, "0.0012"),
        (2.4e-5, "2e-5"),
        (0.2, "0.20"),
        (4.589, "4.6"),
        (1234.5, "1234"),
    ],
)
def test_numbers_in_cells_are_short(value: float, shown: str) -> None:
    assert _short(value) == shown


def test_curves_leave_out_what_was_not_measured_and_survive_noise(make_papers: Make) -> None:
    analysis = make_papers((20, 24), (0.25, 0.5), (0.0, 1.0))
    # Noise may make a de-biased estimate of a square, and even the CA-MSE, negative.
    low = replace(analysis.panels[1], squared_gradient=-0.01)
    low = replace(low, cells=[replace(cell, squared_bias=-1.0) for cell in low.cells])
    analysis = replace(analysis, panels=[analysis.panels[0], low])
    choices = choose(analysis, SelectionConfig())
    for figure in figures(analysis, choices).values():
        FigureCanvasAgg(figure).draw()
    labels = [text.get_text() for text in curves(analysis, choices, 0.95).legends[0].texts]
    assert labels[-1] == "chosen"
    assert "uncompressed" not in labels


def test_a_single_panel_of_a_single_cell_is_a_picture(make_papers: Make, tmp_path: Path) -> None:
    analysis = make_papers((16,), (0.0,), (0.5,))
    assert len(draw(analysis, choose(analysis, SelectionConfig()), 0.95, tmp_path)) == 8
