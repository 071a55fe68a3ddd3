"""FreezeOut against the freeze epochs of paper B's runs."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.freezing import Curve, FreezeOut, FreezeSchedule, NoFreeze, Warmup, frozen_prefix
from pipeline.schedules import RateConfig, Shape

# 100 epochs, 10 of warm-up, cubic, t0 = 0.8: the epoch in which layer i freezes; the last never does.
FREEZE_EPOCHS = (56.08, 59.02, 62.08, 65.27, 68.59, 72.03, 75.61, 79.32, 83.17, 87.16, 91.30, 95.57)
WARMUP_10 = RateConfig(warmup=0.1)


def rates_of(freeze: FreezeSchedule, progress: float, layers: int, rate: RateConfig = WARMUP_10) -> tuple[float, ...]:
    times = freeze.freeze_times(layers)
    return freeze.rates(progress, times, rate.decay, warming_up=progress < rate.warmup)


def test_freeze_times_of_the_paper() -> None:
    times = FreezeOut().freeze_times(13)
    assert times[12] is None
    for layer, epoch in enumerate(FREEZE_EPOCHS):
        assert 10 + 90 * times[layer] == pytest.approx(epoch, abs=5e-3)  # type: ignore[operator]
    assert times[0] == pytest.approx(0.512)


@pytest.mark.parametrize(("layer", "epoch"), enumerate(FREEZE_EPOCHS))
def test_a_layer_is_frozen_from_its_epoch_on(layer: int, epoch: float) -> None:
    before = rates_of(FreezeOut(), (epoch - 0.02) / 100, 13)
    after = rates_of(FreezeOut(), (epoch + 0.02) / 100, 13)
    assert before[layer] > 0
    assert after[layer] == 0.0
    assert frozen_prefix(before) == layer
    assert frozen_prefix(after) == layer + 1


def test_rates_decay_on_each_layers_own_clock() -> None:
    # Hand-computed: progress 0.4 is 1/3 of the post-warm-up part.
    rates = rates_of(FreezeOut(), 0.4, 13)
    for layer, t in enumerate((0.8 + 0.2 * i / 12) ** 3 for i in range(13)):
        assert rates[layer] == pytest.approx(0.5 * (1 + math.cos(math.pi * (1 / 3) / t)))


def test_scaled_rates_warm_up_to_the_layers_own_rate() -> None:
    scaled = FreezeOut(scaled=True)
    assert rates_of(scaled, 0.1, 13)[0] == pytest.approx(1 / 0.512)
    # Half-way through warm-up: half of the layer's own rate, without a jump at its end.
    assert rates_of(scaled, 0.05, 13)[0] == pytest.approx(0.5 / 0.512)
    assert rates_of(scaled, 0.05, 13)[12] == pytest.approx(0.5)
    just_before, at = (rates_of(scaled, p, 13)[0] for p in (0.1 - 1e-9, 0.1))
    assert just_before == pytest.approx(at, rel=1e-6)


@given(st.floats(0.01, 1.0), st.integers(2, 49), st.sampled_from(list(Curve)))
def test_the_last_layer_never_freezes_whatever_the_rounding(t0: float, layers: int, curve: Curve) -> None:
    times = FreezeOut(t0=t0, curve=curve).freeze_times(layers)
    assert times[-1] is None
    assert all(time is not None and 0 < time < 1 for time in times[:-1]) or t0 > 0.999


def test_linear_and_square_curves() -> None:
    assert FreezeOut(t0=0.5, curve=Curve.linear).freeze_times(3) == (0.5, 0.75, None)
    assert FreezeOut(t0=0.5, curve=Curve.square).freeze_times(3) == (0.25, 0.5625, None)


def test_polynomial_decay_also_ends_at_the_freeze_time() -> None:
    rate = RateConfig(warmup=0.0, shape=Shape.polynomial)
    assert rates_of(FreezeOut(t0=0.5, curve=Curve.linear), 0.25, 3, rate)[0] == pytest.approx(0.75)
    assert rates_of(FreezeOut(t0=0.5, curve=Curve.linear), 0.5, 3, rate)[0] == 0.0


@given(st.floats(0, 0.999), st.floats(0.1, 1.0), st.sampled_from(list(Curve)))
def test_frozen_layers_are_a_growing_prefix(progress: float, t0: float, curve: Curve) -> None:
    rates = rates_of(FreezeOut(t0=t0, curve=curve), progress, 8)
    prefix = frozen_prefix(rates)
    assert all(r == 0 for r in rates[:prefix])
    assert all(r > 0 for r in rates[prefix:])
    assert prefix >= frozen_prefix(rates_of(FreezeOut(t0=t0, curve=curve), progress / 2, 8))
    assert prefix < 8


def test_nothing_is_frozen_at_the_first_step() -> None:
    assert frozen_prefix(rates_of(FreezeOut(), 0.0, 13)) == 0
    assert frozen_prefix(rates_of(NoFreeze(), 0.0, 13)) == 0


def test_no_freeze_follows_the_global_rate() -> None:
    assert rates_of(NoFreeze(), 0.4, 3) == (WARMUP_10.decay(0.4),) * 3


def test_t0_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"freeze\.t0 must be in \(0, 1\], got 0; 1 freezes nothing"):
        FreezeOut(t0=0)


def test_the_published_code_warms_all_up_to_one_rate_and_then_jumps() -> None:
    published = FreezeOut(scaled=True, warmup=Warmup.shared)
    assert rates_of(published, 0.05, 13) == pytest.approx((0.5,) * 13)
    before, after = (rates_of(published, p, 13)[0] for p in (0.1 - 1e-9, 0.1))
    assert (before, after) == pytest.approx((1.0, 1 / 0.512))
    assert rates_of(published, 0.4, 13) == rates_of(FreezeOut(scaled=True), 0.4, 13)


def test_layers_wait_until_they_have_seen_whole_images() -> None:
    patient = FreezeOut(see_whole=0.05)
    usual = FreezeOut().freeze_times(13)
    assert patient.freeze_times(13) == usual
    # Whole from 0.7 on: layers 0 to 6 would freeze before 0.75 and wait for it; the others are as ever.
    times = patient.freeze_times(13, whole_from=0.7)
    assert times[:7] == pytest.approx((0.75,) * 7)
    assert times[7:] == usual[7:]
    assert FreezeOut().freeze_times(13, whole_from=0.7) == usual


@pytest.mark.parametrize("whole_from", [0.96, math.inf])
def test_waiting_for_what_does_not_come_is_refused(whole_from: float) -> None:
    with pytest.raises(ValueError, match=r"freeze\.see_whole=0\.05: the compression leaves no layer that much"):
        FreezeOut(see_whole=0.05).freeze_times(13, whole_from)


@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
def test_a_wait_is_a_share(share: float) -> None:
    with pytest.raises(ValueError, match=r"freeze\.see_whole must be a share of the run in \[0, 1\)"):
        FreezeOut(see_whole=share)


@pytest.mark.parametrize("freeze", [NoFreeze(), FreezeOut()])
def test_the_last_layer_learns_to_the_very_end(freeze: FreezeSchedule) -> None:
    # Where the cosine rounds to zero.
    for progress in (1 - 1e-9, 1.0):
        assert WARMUP_10.decay(progress) == 0.0
        assert frozen_prefix(rates_of(freeze, progress, 13)) == (0 if isinstance(freeze, NoFreeze) else 12)
