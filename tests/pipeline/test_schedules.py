"""The clock and the plan."""

import math

import pytest

from pipeline.compression import PatchScaling, Stage, Staged
from pipeline.compression.schedule import compression
from pipeline.freezing import Curve, FreezeOut
from pipeline.schedules import WARMUP_START, Budget, RateConfig, Schedules, Shape, Unit


def schedules(**changes: object) -> Schedules:
    rate = RateConfig(base=1e-3, warmup=0.2)
    parts = {
        "rate": rate,
        "peak_rate": rate.peak(512),
        "weight_decay": 0.1,
        "compression": Staged([Stage(0.5, 24, 0.5)]),
        "freeze": FreezeOut(t0=0.5, curve=Curve.linear),
        "num_layers": 3,
        "momentum": lambda progress: 0.99 + 0.01 * progress,
        "key_compression": lambda c: c.only(PatchScaling),
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


def test_polynomial_stays_above_cosine_late() -> None:
    cosine, polynomial = RateConfig(warmup=0.0), RateConfig(warmup=0.0, shape=Shape.polynomial)
    assert polynomial.decay(0.5) == 0.75
    assert all(polynomial.decay(p) > cosine.decay(p) for p in (0.1, 0.5, 0.9, 0.99))
    assert polynomial.decay(1.0) == 0.0


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
        ({"warmup": 1.0}, r"rate\.warmup must be a share .* got 1\."),
    ],
)
def test_bad_rates_are_refused(arguments: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        RateConfig(**arguments)  # type: ignore[arg-type]
