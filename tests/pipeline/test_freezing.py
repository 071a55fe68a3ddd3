"""FreezeOut against the freeze epochs of paper B's runs."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.freezing import Curve, FreezeOut, NoFreeze, frozen_prefix
from pipeline.schedules import RateConfig, Shape

# 100 epochs, 10 of warm-up, cubic, t0 = 0.8: the epoch in which layer i freezes; the last never does.
FREEZE_EPOCHS = (56.08, 59.02, 62.08, 65.27, 68.59, 72.03, 75.61, 79.32, 83.17, 87.16, 91.30, 95.57)
WARMUP_10 = RateConfig(warmup=0.1)


def test_freeze_times_of_the_paper() -> None:
    times = FreezeOut().freeze_times(13)
    assert times[12] is None
    for layer, epoch in enumerate(FREEZE_EPOCHS):
        assert 10 + 90 * times[layer] == pytest.approx(epoch, abs=5e-3)  # type: ignore[operator]
    assert times[0] == pytest.approx(0.512)


@pytest.mark.parametrize(("layer", "epoch"), enumerate(FREEZE_EPOCHS))
def test_a_layer_is_frozen_from_its_epoch_on(layer: int, epoch: float) -> None:
    before = FreezeOut().rates((epoch - 0.02) / 100, 13, WARMUP_10.decay)
    after = FreezeOut().rates((epoch + 0.02) / 100, 13, WARMUP_10.decay)
    assert before[layer] > 0
    assert after[layer] == 0.0
    assert frozen_prefix(before) == layer
    assert frozen_prefix(after) == layer + 1


def test_rates_decay_on_each_layers_own_clock() -> None:
    # Hand-computed: progress 0.4 is 1/3 of the post-warm-up part.
    rates = FreezeOut().rates(0.4, 13, WARMUP_10.decay)
    for layer, t in enumerate((0.8 + 0.2 * i / 12) ** 3 for i in range(13)):
        assert rates[layer] == pytest.approx(0.5 * (1 + math.cos(math.pi * (1 / 3) / t)))


def test_scaled_rates_warm_up_to_the_layers_own_rate() -> None:
    scaled = FreezeOut(scaled=True)
    assert scaled.rates(0.1, 13, WARMUP_10.decay)[0] == pytest.approx(1 / 0.512)
    # Half-way through warm-up: half of the layer's own rate, without a jump at its end.
    assert scaled.rates(0.05, 13, WARMUP_10.decay)[0] == pytest.approx(0.5 / 0.512)
    assert scaled.rates(0.05, 13, WARMUP_10.decay)[12] == pytest.approx(0.5)
    just_before, at = (scaled.rates(p, 13, WARMUP_10.decay)[0] for p in (0.1 - 1e-9, 0.1))
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
    assert FreezeOut(t0=0.5, curve=Curve.linear).rates(0.25, 3, rate.decay)[0] == pytest.approx(0.75)
    assert FreezeOut(t0=0.5, curve=Curve.linear).rates(0.5, 3, rate.decay)[0] == 0.0


@given(st.floats(0, 0.999), st.floats(0.1, 1.0), st.sampled_from(list(Curve)))
def test_frozen_layers_are_a_growing_prefix(progress: float, t0: float, curve: Curve) -> None:
    rates = FreezeOut(t0=t0, curve=curve).rates(progress, 8, WARMUP_10.decay)
    prefix = frozen_prefix(rates)
    assert all(r == 0 for r in rates[:prefix])
    assert all(r > 0 for r in rates[prefix:])
    assert prefix >= frozen_prefix(FreezeOut(t0=t0, curve=curve).rates(progress / 2, 8, WARMUP_10.decay))
    assert prefix < 8


def test_nothing_is_frozen_at_the_first_step() -> None:
    assert frozen_prefix(FreezeOut().rates(0.0, 13, WARMUP_10.decay)) == 0
    assert frozen_prefix(NoFreeze().rates(0.0, 13, WARMUP_10.decay)) == 0


def test_no_freeze_follows_the_global_rate() -> None:
    assert NoFreeze().rates(0.4, 3, WARMUP_10.decay) == (WARMUP_10.decay(0.4),) * 3


def test_t0_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"freeze\.t0 must be in \(0, 1\], got 0; 1 freezes nothing"):
        FreezeOut(t0=0)
