"""Which compression at which progress: from measured gradient errors to the stages of a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations, groupby, pairwise

from pipeline.analysis.results import Analysis, CellError, Panel
from pipeline.analysis.student import two_sided
from pipeline.compression.schedule import Stage

# (patch size, dropout): what a cell is called at every panel.
Shape = tuple[int, float]
# What a cell gives away at one panel, in the order in which it counts: normalized CA-MSE above the best one's (0 where
# the difference may be noise), cost of a sample, query tokens dropped.
Loss = tuple[float, float, int]
NOTHING: Loss = (0.0, 0.0, 0)
IMPOSSIBLE: Loss = (float("inf"), 0.0, 0)
# Progress is written with so many decimals.
DECIMALS = 6


@dataclass
class SelectionConfig:
    """How stages follow from what was measured."""

    # A cell is as good as the best one unless the paired difference is significant at this level (two-sided Student t
    # over sub-batches); of such cells the cheapest is taken. 0 takes the smallest estimate.
    confidence: float = 0.95
    # ... and unless its estimate is above the best one by more than this share: the noisiest cells, whose intervals
    # overlap with everything, are mostly the most compressed.
    tolerance: float = 0.1
    # Compression never rises again: no stage takes a cell that would cost less than the previous stage's.
    monotone: bool = False
    # At most so many different cells, each of which is a shape to compile for; 0 is no limit.
    max_shapes: int = 0
    # The paper's estimates of the squared bias, which are too high by the variance of the mean.
    plugin: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.confidence < 1:
            raise ValueError(
                f"selection.confidence must be in [0, 1), got {self.confidence:g}; 0 takes the smallest estimate."
            )
        if not self.tolerance >= 0:
            raise ValueError(
                f"selection.tolerance must be a share of at least 0, got {self.tolerance:g}; 0.1 is usual."
            )
        if self.max_shapes < 0:
            raise ValueError(f"selection.max_shapes must not be negative, got {self.max_shapes}; 0 is no limit.")


@dataclass(frozen=True)
class Choice:
    """What was chosen at one panel, and what else there was."""

    panel: Panel
    # The smallest CA-MSE.
    best: CellError
    # Those that are not worse beyond noise and tolerance, the best one among them.
    ties: list[CellError]
    chosen: CellError


def estimates(analysis: Analysis, plugin: bool) -> Analysis:
    """Return the analysis, with the paper's estimates of the squared bias in place of the de-biased ones if asked."""
    if not plugin:
        return analysis

    def biased(panel: Panel) -> Panel:
        return replace(panel, cells=[replace(c, squared_bias=c.squared_bias_plugin) for c in panel.cells])

    return replace(analysis, panels=[biased(panel) for panel in analysis.panels])


def choose(analysis: Analysis, config: SelectionConfig) -> list[Choice]:
    """Return what to do at each panel: the least loss over all panels that the constraints allow, exactly.

    Panels count equally. Ties lose nothing, and among solutions of equal loss the one that is cheapest, then the one
    that keeps most tokens, is taken. Standard errors are those of the de-biased estimates also with `plugin`.
    """
    panels = estimates(analysis, config.plugin).panels
    assert panels
    assert all([shape(c) for c in panel.cells] == [shape(c) for c in panels[0].cells] for panel in panels)
    z = two_sided(config.confidence, analysis.sub_batches - 1)
    bests = [min(panel.cells, key=panel.ca_mse) for panel in panels]
    ties = [_ties(panel, best, z, config.tolerance) for panel, best in zip(panels, bests, strict=True)]
    losses = [_losses(*each) for each in zip(panels, bests, ties, strict=True)]
    shapes = min(config.max_shapes or len(panels), len(panels))
    indices = _rising_path(panels, losses, shapes) if config.monotone else _free_path(losses, shapes)
    chosen = [panel.cells[index] for panel, index in zip(panels, indices, strict=True)]
    return [Choice(*each) for each in zip(panels, bests, ties, chosen, strict=True)]


def stages(choices: Sequence[Choice]) -> list[Stage]:
    """Return one stage for each run of panels with the same cell; ends are midpoints between panels, the last is 1."""
    reached = zip(choices, ends([choice.panel for choice in choices]), strict=True)
    found = []
    for (patch_size, dropout), group in groupby(reached, lambda pair: shape(pair[0].chosen)):
        found.append(Stage(patch_size, dropout, until=list(group)[-1][1]))
    return found


def ends(panels: Sequence[Panel]) -> list[float]:
    """Return the progress up to which each panel is the nearest one; the last reaches to the end."""
    points = [panel.progress for panel in panels]
    assert all(a < b for a, b in pairwise(points)), "panels must be of different checkpoints, in order"
    return [round((a + b) / 2, DECIMALS) for a, b in pairwise(points)] + [1.0]


def best_constant(analysis: Analysis) -> Shape:
    """Return the one cell with the smallest mean over panels of the normalized CA-MSE."""

    def total(each: Shape) -> float:
        return sum(panel.ca_mse(find(panel, each)) / panel.magnitude for panel in analysis.panels)

    return min((shape(cell) for cell in analysis.panels[0].cells), key=total)


def shape(cell: CellError) -> Shape:
    """Return what a cell is called."""
    return cell.patch_size, cell.dropout


def find(panel: Panel, wanted: Shape) -> CellError:
    """Return a panel's cell of that name."""
    return next(cell for cell in panel.cells if shape(cell) == wanted)


def _ties(panel: Panel, best: CellError, z: float, tolerance: float) -> list[CellError]:
    """Return the cells above the best one's CA-MSE by at most z standard errors of the difference and `tolerance`."""
    least = panel.ca_mse(best)
    # De-biased estimates may be negative.
    most = tolerance * abs(least)
    return [c for c in panel.cells if panel.ca_mse(c) - least <= min(z * panel.difference_error(c, best), most)]


def _losses(panel: Panel, best: CellError, ties: list[CellError]) -> list[Loss]:
    def above(cell: CellError) -> float:
        return 0.0 if cell in ties else (panel.ca_mse(cell) - panel.ca_mse(best)) / panel.magnitude

    return [(above(cell), cell.cost, -cell.query_tokens) for cell in panel.cells]


def _plus(one: Loss, other: Loss) -> Loss:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


def _free_path(losses: list[list[Loss]], shapes: int) -> list[int]:
    """Return the index of each panel's cell, at most `shapes` different ones, that lose least in total.

    Splits the panels into groups that share a cell, in every way: 3^panels steps, whatever the grid.
    """

    @cache
    def shared(group: tuple[int, ...]) -> tuple[Loss, int]:
        sums = (_total(losses, group, cell) for cell in range(len(losses[0])))
        return min((total, cell) for cell, total in enumerate(sums))

    @cache
    def split(rest: tuple[int, ...], groups: int) -> tuple[Loss, dict[int, int]]:
        if not rest:
            return NOTHING, {}
        best: tuple[Loss, dict[int, int]] = (IMPOSSIBLE, {})
        for group in [rest] if groups == 1 else _groups_with_first(rest):
            loss, cell = shared(group)
            others, cells = split(tuple(i for i in rest if i not in group), groups - 1)
            if _plus(loss, others) < best[0]:
                best = _plus(loss, others), cells | dict.fromkeys(group, cell)
        return best

    cells = split(tuple(range(len(losses))), shapes)[1]
    return [cells[i] for i in range(len(losses))]


def _total(losses: list[list[Loss]], group: tuple[int, ...], cell: int) -> Loss:
    total = NOTHING
    for panel in group:
        total = _plus(total, losses[panel][cell])
    return total


def _groups_with_first(panels: tuple[int, ...]) -> list[tuple[int, ...]]:
    first, *others = panels
    return [(first, *more) for size in range(len(others) + 1) for more in combinations(others, size)]


def _rising_path(panels: list[Panel], losses: list[list[Loss]], shapes: int) -> list[int]:
    """Return the same for paths whose cells never get cheaper, each compared with the previous one at the same panel.

    A cell that was left counts as another one when it is taken again, which only cells of equal cost allow.
    """
    count = len(losses[0])

    @cache
    def onward(i: int, cell: int, left: int) -> tuple[Loss, tuple[int, ...]]:
        """Return the least loss from panel i on, which takes `cell`, and its path; `left` more cells may follow."""
        if i + 1 == len(panels):
            return losses[i][cell], (cell,)
        costs = [each.cost for each in panels[i + 1].cells]
        following = [onward(i + 1, cell, left)]
        if left:
            following += [onward(i + 1, c, left - 1) for c in range(count) if c != cell and costs[c] >= costs[cell]]
        loss, path = min(following)
        return _plus(losses[i][cell], loss), (cell, *path)

    return list(min(onward(0, cell, shapes - 1) for cell in range(count))[1])
