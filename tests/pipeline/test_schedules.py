"""The clock and the plan."""

import math

import pytest

from pipeline.compression import Compression, PatchScaling, Stage, Staged
from pipeline.compression.schedule import compression
from pipeline.freezing import Curve, FreezeOut, NoFreeze
from pipeline.optim import OptimConfig
from pipeline.schedules import WARMUP_START, Budget, RateConfig, Schedules, Shape, Unit


class FakeMethod:
    def momentum(self, progress: float) -> float:
        return 0.99 + 0.01 * progress

    def teacher_temperature(self, progress: float) -> float:
        return 0.04 + 0.03 * progress

    def last_layer_learns(self, progress: float) -> bool:
        return progress >= 0.1

    def key_compression(self, query: Compression) -> Compression:
        return query.only(PatchScaling)


def schedules(**changes: object) -> Schedules:
    rate = RateConfig(base=1e-3, warmup=0.2)
    parts = {
        "rate": rate,
        "peak_rate": rate.peak(512),
        "weight_decay": OptimConfig(weight_decay=0.1).weight_decay_at,
        "compression": Staged([Stage(24, 0.5, until=0.5)]),
        "freeze": FreezeOut(t0=0.5, curve=Curve.linear),
        "num_layers": 3,
        "method": FakeMethod(),
    }
    return Schedules(**(parts | changes))  # type: ignore[arg-type]


def test_budget_units() -> None:
    spent = {"steps": 10, "samples": 2560, "cost": 640.0}
    assert Budget(20, Unit.steps).progress(**spent) == 0.5
    assert Budget(25600, Unit.samples).progress(**spent) == 0.1
    assert Budget(640, Unit.cost).progress(**spent) == 1.0
    assert Budget(600, Unit.cost).progress(**spent) == 1.0


def test_cosine_after_linear_warmup() -> None:
    rate = RateConfig(warmup=0.2)
    assert rate.decay(0.0) == WARMUP_START
    assert rate.decay(0.1) == pytest.approx(0.5)
    assert rate.decay(0.2) == 1.0
    assert rate.decay(0.6) == pytest.approx(0.5)
    assert rate.decay(0.4) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert rate.decay(1.0) == 0.0


def test_layers_learn_slower_the_farther_they_are_from_the_heads() -> None:
    rate = RateConfig(base=1e-3, warmup=0.2, layer_decay=0.5)
    plan = schedules(rate=rate, freeze=NoFreeze()).at(0.2)
    assert plan.layer_rates == pytest.approx((2e-3 / 8, 2e-3 / 4, 2e-3 / 2))
    assert plan.learning_rate == 2e-3
    # The same share at any time, and nothing of what is frozen.
    frozen = schedules(rate=rate).at(0.7)
    whole = schedules(rate=RateConfig(base=1e-3, warmup=0.2)).at(0.7)
    assert frozen.layer_rates[0] == whole.layer_rates[0] == 0
    assert frozen.layer_rates[1:] == pytest.approx(
        [r * f for r, f in zip(whole.layer_rates[1:], (0.25, 0.5), strict=True)]
    )
    with pytest.raises(ValueError, match=r"rate\.layer_decay must be in \(0, 1\], got 0; 0\.65 to 0\.75 are usual"):
        RateConfig(layer_decay=0.0)


def test_polynomial_stays_above_cosine_late() -> None:
    cosine, polynomial = RateConfig(warmup=0.0), RateConfig(warmup=0.0, shape=Shape.polynomial)
    assert polynomial.decay(0.5) == 0.75
    assert all(polynomial.decay(p) > cosine.decay(p) for p in (0.1, 0.5, 0.9, 0.99))
    assert polynomial.decay(1.0) == 0.0


def test_the_rate_ends_at_its_final_share_and_frozen_layers_at_zero() -> None:
    for shape, halfway in ((Shape.cosine, 0.5), (Shape.polynomial, 0.75)):
        rate = RateConfig(warmup=0.0, shape=shape, final=0.1)
        assert rate.decay(0.0) == 1.0
        assert rate.decay(0.5) == pytest.approx(0.1 + 0.9 * halfway)
        assert rate.decay(1.0) == pytest.approx(0.1)
        assert rate.decay(0.25, end=0.5) == pytest.approx(halfway)
        assert rate.decay(0.5, end=0.5) == 0.0


def test_linear_scaling_rule() -> None:
    assert RateConfig(base=1.5e-4).peak(4096) == pytest.approx(2.4e-3)


def test_plan_holds_every_schedule() -> None:
    plan = schedules().at(0.2)
    assert plan.learning_rate == pytest.approx(2e-3)
    assert plan.layer_rates == pytest.approx((2e-3, 2e-3, 2e-3))
    assert plan.momentum == pytest.approx(0.992)
    assert plan.query == compression(24, 0.5)
    assert plan.key == compression(24, 0)
    assert plan.frozen_layers == 0
    assert plan.weight_decay == 0.1
    assert plan.teacher_temperature == pytest.approx(0.046)
    assert plan.last_layer_rate == plan.learning_rate


def test_the_last_layer_waits() -> None:
    assert schedules().at(0.09).last_layer_rate == 0.0
    assert schedules().at(0.09).learning_rate > 0


def test_weight_decay_follows_a_cosine_to_its_end() -> None:
    decay = OptimConfig(weight_decay=0.04, weight_decay_end=0.4).weight_decay_at
    assert decay(0.0) == pytest.approx(0.04)
    assert decay(0.5) == pytest.approx(0.22)
    assert decay(0.25) == pytest.approx(0.22 - 0.18 * math.cos(math.pi / 4))
    assert decay(1.0) == pytest.approx(0.4)


def test_plan_freezes_and_relaxes() -> None:
    plan = schedules().at(0.2 + 0.8 * 0.5)
    assert plan.frozen_layers == 1
    assert plan.layer_rates[0] == 0.0
    assert plan.query.compressors == ()


def test_changes_are_where_steps_change_shape() -> None:
    assert schedules().changes() == pytest.approx([0.5, 0.6, 0.8])
    eps = 1e-6
    for change in schedules().changes():
        before, after = schedules().at(change - eps), schedules().at(change + eps)
        assert (before.query, before.frozen_layers) != (after.query, after.frozen_layers)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"base": 0.0}, r"rate\.base must be above 0"),
        ({"final": 1.1}, r"rate\.final must be a share of the peak"),
        ({"warmup": 1.0}, r"rate\.warmup must be a share .* got 1\."),
    ],
)
def test_bad_rates_are_refused(arguments: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        RateConfig(**arguments)  # type: ignore[arg-type]
