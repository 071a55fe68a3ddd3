"""The grid that a run chooses from."""

import pytest

from pipeline.compression import Adaptive, Compression
from pipeline.compression.schedule import compression


def test_the_grid_is_the_papers_at_240_pixels_and_starts_with_a_mix_of_both() -> None:
    grid = Adaptive().fitted(240, 16)
    assert grid.patch_sizes == [16, 20, 24, 30, 40, 48]
    assert grid.dropouts == [0, 0.25, 0.5, 0.75, 0.9]
    assert len(grid.grid()) == 30
    assert grid.start == (24, 0.5)
    assert grid.at(0.0) == grid.at(0.9) == compression(24, 0.5)
    assert grid.changes() == []


@pytest.mark.parametrize(
    ("image_size", "patch_size", "sizes", "start"),
    [(224, 16, [16, 28, 32], 28), (32, 8, [8, 16], 16), (48, 8, [8, 12, 16, 24], 12), (17, 17, [17], 17)],
)
def test_other_models_have_other_sizes(image_size: int, patch_size: int, sizes: list[int], start: int) -> None:
    grid = Adaptive().fitted(image_size, patch_size)
    assert (grid.patch_sizes, grid.start_patch_size) == (sizes, start)


def test_neighbors_are_one_step_away_and_inside() -> None:
    grid = Adaptive().fitted(240, 16)
    assert set(grid.neighbors((24, 0.5))) == {(20, 0.5), (30, 0.5), (24, 0.25), (24, 0.75)}
    assert set(grid.neighbors((16, 0.0))) == {(20, 0.0), (16, 0.25)}
    assert set(grid.neighbors((48, 0.9))) == {(40, 0.9), (48, 0.75)}


def test_the_own_patches_without_dropout_are_no_compression_at_all() -> None:
    assert Adaptive().fitted(240, 16).compression((16, 0.0)) == Compression()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"share": 0.0}, r"compression\.share must be in \(0, 0\.5\], got 0; 0\.02 is usual\."),
        ({"share": 0.51}, r"compression\.share must be in \(0, 0\.5\], got 0\.51"),
        ({"share": float("nan")}, r"compression\.share must be in \(0, 0\.5\], got nan"),
        ({"memory": 0.0}, r"compression\.memory must be a progress in \(0, 1\], got 0"),
        ({"evidence": -1.0}, r"compression\.evidence must not be negative, got -1"),
        ({"sub_batches": 2}, r"compression\.sub_batches must be at least 3, got 2; 8 is usual"),
        ({"dropouts": [0.5, 0.25]}, r"compression\.dropouts must rise, got \[0\.5, 0\.25\]"),
        ({"dropouts": []}, r"compression\.dropouts must list rates in \[0, 1\), got \[\]"),
        ({"dropouts": [0.5, 1.0]}, r"compression\.dropouts must list rates in \[0, 1\), got \[0\.5, 1\.0\]"),
        ({"dropouts": [0.0, 0.3]}, r"compression\.start_dropout must be one of .*=\[0\.0, 0\.3\], got 0\.5; start at"),
        ({"patch_sizes": [16, 16]}, r"compression\.patch_sizes must rise, got \[16, 16\]"),
        ({"patch_sizes": [16, 24], "start_patch_size": 20}, r"compression\.start_patch_size must be one of .* got 20"),
        ({"start_patch_size": 28}, r"compression\.start_patch_size must be one of \[16, 20, .* got 28; start at one"),
        (
            {"patch_sizes": [16, 28]},
            r"compression\.patch_sizes must divide model\.image_size=240, got 28; leave .*, 48",
        ),
        ({"patch_sizes": [0, 16]}, r"compression\.patch_sizes must divide model\.image_size=240, got 0"),
        (
            {"patch_sizes": [16], "dropouts": [0.5]},
            r"must leave a choice, got \[16\] and \[0\.5\]; say compression=con",
        ),
    ],
)
def test_what_no_run_can_mean_is_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Adaptive(**changes).fitted(240, 16)  # type: ignore[arg-type]
