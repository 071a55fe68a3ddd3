"""Token counts by integer arithmetic, and the costs that paper A prints."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.compression import (
    Compression,
    Constant,
    NoCompression,
    PatchScaling,
    Stage,
    Staged,
    TokenDropout,
)
from pipeline.compression.schedule import compression

# Figure 3 of Lin et al., 2024: cost of a MoCo-v3 sample at 240 pixels, key uncompressed, by patch size and dropout.
# The paper counts (N + 1)(1 - d) query tokens without rounding, 226 key tokens, over 197.
DROPOUTS = (0.0, 0.25, 0.5, 0.75, 0.9)
FIGURE_3 = {
    48: (26, (1.5431, 1.4442, 1.3452, 1.2462, 1.1868)),
    40: (37, (1.7107, 1.5698, 1.4289, 1.2881, 1.2036)),
    30: (65, (2.1371, 1.8896, 1.6421, 1.3947, 1.2462)),
    24: (101, (2.6853, 2.3008, 1.9162, 1.5317, 1.3010)),
    20: (145, (3.3553, 2.8033, 2.2513, 1.6992, 1.3680)),
    16: (226, (4.5888, 3.7284, 2.8680, 2.0076, 1.4914)),
}


@pytest.mark.parametrize("patch_size", FIGURE_3)
@pytest.mark.parametrize("column", range(5))
def test_nominal_length_gives_figure_3(patch_size: int, column: int) -> None:
    tokens, costs = FIGURE_3[patch_size]
    cell = compression(patch_size, DROPOUTS[column])
    assert Compression((PatchScaling(patch_size),)).sequence_length(240, 16) == tokens
    nominal = (3 * cell.nominal_length(240, 16) + 226) / 197
    assert float(nominal) == pytest.approx(costs[column], abs=5e-5)


@pytest.mark.parametrize(
    ("patch_size", "dropout", "tokens"),
    # Real tokens, class token included, worked out by hand: floor(N (1 - d)) + 1.
    [
        (48, 0.9, 3),
        (40, 0.75, 10),
        (30, 0.5, 33),
        (24, 0.9, 11),
        (20, 0.25, 109),
        (16, 0.9, 23),
        (16, 0.75, 57),
        (24, 0.25, 76),
    ],
)
def test_real_length_at_240_pixels(patch_size: int, dropout: float, tokens: int) -> None:
    assert compression(patch_size, dropout).sequence_length(240, 16) == tokens


@pytest.mark.parametrize(("dropout", "tokens"), [(0.75, 50), (0.9, 20), (0.5, 99), (0.0, 197)])
def test_real_length_at_224_pixels_is_the_papers(dropout: float, tokens: int) -> None:
    assert compression(None, dropout).sequence_length(224, 16) == tokens


def test_table_2b_counts_patches_without_class_token() -> None:
    printed = {16: 4.59, 20: 2.94, 24: 2.04, 30: 1.31, 40: 0.73}
    for patch_size, cost in printed.items():
        patches = compression(patch_size, 0).num_patches(240, 16)
        assert round(4 * patches / 196, 2) == cost


def test_table_2c_costs_of_asymmetric_patch_sizes() -> None:
    printed = {16: 2.1, 20: 1.7, 24: 1.5, 30: 1.3}
    query = compression(30, 0).nominal_length(240, 16)
    for patch_size, cost in printed.items():
        key = compression(patch_size, 0).nominal_length(240, 16)
        assert round(float((3 * query + key) / 197), 1) == cost


@given(st.integers(1, 2000), st.integers(0, 99))
def test_dropout_keeps_the_floor_in_integers(num_tokens: int, percent: int) -> None:
    assert TokenDropout(percent / 100).keep(num_tokens) == max(1, num_tokens * (100 - percent) // 100)


def test_floats_would_lose_a_token() -> None:
    assert int(100 * (1 - 0.9)) == 9
    assert TokenDropout(0.9).keep(100) == 10


def test_a_patch_size_that_does_not_divide_names_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"patch_size must divide model.image_size=240, got 22; .* 24, 30"):
        compression(22, 0).sequence_length(240, 16)


def test_only_keeps_one_kind() -> None:
    both = compression(24, 0.5)
    assert both.only(PatchScaling) == compression(24, 0)
    assert both.only(TokenDropout) == compression(None, 0.5)


def test_staged_walks_through_its_stages_and_ends_uncompressed() -> None:
    schedule = Staged([Stage(30, 0.5, until=0.25), Stage(20, 0.25, until=0.5)])
    assert schedule.at(0.0) == schedule.at(0.2499) == compression(30, 0.5)
    assert schedule.at(0.25) == compression(20, 0.25)
    assert schedule.at(0.5) == schedule.at(1.0) == Compression()
    assert schedule.changes() == [0.25, 0.5]


def test_none_and_constant() -> None:
    assert NoCompression().at(0.7) == Compression()
    assert Constant(24, 0.5).at(0.0) == Constant(24, 0.5).at(1.0) == compression(24, 0.5)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: Constant(dropout=1.0),
            r"compression\.dropout must be in \[0, 1\), got 1\.0; 0 keeps every token\.",
        ),
        (lambda: Constant(patch_size=0), r"compression\.patch_size must be a number of pixels, got 0"),
        (lambda: Staged([]), r"compression\.stages must list at least one stage, got \[\]; say"),
        (
            lambda: Staged([Stage(until=0.5), Stage(until=0.5)]),
            r"compression\.stages\[1\]\.until must rise .* got 0\.5 after 0\.5",
        ),
        (
            lambda: Staged([Stage(until=1.5)]),
            r"compression\.stages\[0\]\.until must rise .* within \(0, 1\], got 1\.5",
        ),
        (lambda: Staged([Stage(until=0.5, dropout=-0.1)]), r"compression\.stages\[0\]\.dropout must be in"),
    ],
)
def test_what_no_run_can_mean_is_refused(make: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()  # type: ignore[operator]


def test_the_keys_of_an_ablation_go_their_own_way() -> None:
    query, rule = compression(30, 0.5), compression(30, 0.0)
    for schedule, size, keep in (
        (Constant(30, 0.5), 30, 64),
        (Constant(30, 0.5, key_patch_size=20), 20, 144),
        (Constant(30, 0.5, key_dropout=0.25), 30, 48),
        (Constant(30, 0.5, key_patch_size=16, key_dropout=0.0), 16, 225),
        (Staged([Stage(30, 0.5, key_patch_size=24, until=0.4)]), 24, 100),
    ):
        assert schedule.at(0.3) == query
        key = schedule.key_at(0.3, rule)
        assert (key.patch_size(16), key.keep(key.num_patches(240, 16))) == (size, keep)


def test_an_ablation_can_take_dropout_from_the_key() -> None:
    key = Constant(None, 0.5, key_dropout=0.0).key_at(0.0, compression(None, 0.5))
    assert key.sequence_length(224, 16) == 197
