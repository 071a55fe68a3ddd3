"""Since when a model has seen whole images, and what is said of layers that do not wait for it."""

import logging
import math

import pytest

from pipeline.compression import Adaptive, CompressionSchedule, Constant, FittedAdaptive, NoCompression, Staged
from pipeline.compression.schedule import Stage
from pipeline.freezing import FreezeOut, FreezeSchedule, NoFreeze
from pipeline.interplay import check_waiting, warn_of_early_freezing, whole_from
from pipeline.methods import MoCoConfig, build_method
from pipeline.models.vit import ViT, ViTConfig
from pipeline.optim import OptimConfig
from pipeline.schedules import RateConfig, Schedules

SCHEDULES = [
    (NoCompression(), 0.0),
    (Constant(8, 0.0), 0.0),
    (Constant(16, 0.0), math.inf),
    (Constant(None, 0.5), math.inf),
    (Staged([Stage(patch_size=16, dropout=0.5, until=0.6)]), 0.6),
    # First whole patches, of which some are dropped, then all of the larger ones: each was there by 0.4.
    (Staged([Stage(dropout=0.5, until=0.4), Stage(patch_size=16, until=1.0)]), 0.4),
    (Staged([Stage(dropout=0.5, until=0.4), Stage(patch_size=16, dropout=0.5, until=1.0)]), math.inf),
]


def schedules_of(compression: CompressionSchedule, freeze: FreezeSchedule) -> Schedules:
    method = build_method(
        MoCoConfig(hidden_dim=8, out_dim=8), ViT(ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 4, 3), 0)
    )
    rate = RateConfig(warmup=0.1)
    start = whole_from(compression, 32, 8)
    return Schedules(rate, 1e-3, OptimConfig().weight_decay_at, compression, freeze, 5, method, start)


@pytest.mark.parametrize(("schedule", "expected"), SCHEDULES)
def test_images_are_whole_once_own_patches_and_all_tokens_have_come(
    schedule: CompressionSchedule, expected: float
) -> None:
    assert whole_from(schedule, 32, 8) == expected


def said(caplog: pytest.LogCaptureFixture, compression: CompressionSchedule, freeze: FreezeSchedule) -> str:
    with caplog.at_level(logging.WARNING):
        warn_of_early_freezing(schedules_of(compression, freeze))
    return caplog.text


def test_layers_that_freeze_too_early_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    # Cubic, 0.8: layers freeze at 56.1, 64.3, 73.1 and 82.4 % of the budget.
    staged = Staged([Stage(patch_size=16, until=0.7)])
    text = said(caplog, staged, FreezeOut())
    assert "2 layers freeze from 56.1% of the budget on" in text
    assert "come from 70.0% of the budget on; freeze.see_whole=0.05 lets them wait" in text


def test_all_layers_are_too_early_for_what_never_comes(caplog: pytest.LogCaptureFixture) -> None:
    text = said(caplog, Constant(16, 0.5), FreezeOut())
    assert "4 layers freeze" in text
    assert "never come in this run; evaluation sees nothing else" in text


@pytest.mark.parametrize(
    ("compression", "freeze"),
    [
        (NoCompression(), FreezeOut()),
        (Constant(16, 0.5), NoFreeze()),
        (Staged([Stage(patch_size=16, until=0.5)]), FreezeOut()),
        (Staged([Stage(patch_size=16, until=0.7)]), FreezeOut(see_whole=0.02)),
    ],
)
def test_nothing_is_said_of_layers_that_wait(
    caplog: pytest.LogCaptureFixture, compression: CompressionSchedule, freeze: FreezeSchedule
) -> None:
    assert said(caplog, compression, freeze) == ""


@pytest.fixture
def adaptive() -> FittedAdaptive:
    return Adaptive(patch_sizes=[8, 16]).fitted(32, 8)


def test_nobody_says_what_an_adaptive_run_will_see(caplog: pytest.LogCaptureFixture, adaptive: FittedAdaptive) -> None:
    assert math.isinf(whole_from(adaptive, 32, 8))
    assert "may not have come by then: compression=adaptive decides" in said(caplog, adaptive, FreezeOut())


def test_waiting_for_an_adaptive_run_is_refused(adaptive: FittedAdaptive) -> None:
    check_waiting(adaptive, FreezeOut())
    check_waiting(NoCompression(), FreezeOut(see_whole=0.1))
    with pytest.raises(ValueError, match=r"freeze\.see_whole=0\.1 asks when compression ends, which compression=adapt"):
        check_waiting(adaptive, FreezeOut(see_whole=0.1))


def test_the_plan_freezes_when_the_waiting_is_over() -> None:
    schedules = schedules_of(Staged([Stage(patch_size=16, until=0.7)]), FreezeOut(see_whole=0.1))
    start = 0.7 + 0.1 * 0.9
    assert schedules.freezes() == pytest.approx([start, start, start, 0.1 + 0.9 * 0.95**3])
    assert schedules.at(start - 1e-6).frozen_layers == 0
    assert schedules.at(start + 1e-6).frozen_layers == 3
