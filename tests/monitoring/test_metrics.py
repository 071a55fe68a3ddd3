import pytest

from monitoring.metrics import CATALOG, check


@pytest.mark.parametrize("metric", CATALOG.values(), ids=lambda m: m.name)
def test_names_follow_prometheus_conventions(metric):
    assert metric.name.endswith("_total") == (metric.kind == "counter") or metric.name == "budget_total"
    assert metric.name == metric.name.lower()
    assert metric.help[0].isupper()
    assert metric.help.endswith(".")


def test_unknown_names_are_refused_by_name():
    check({"loss": 1.0, "step": 2})
    with pytest.raises(AssertionError, match=r"losss, train/loss: not in the catalogue"):
        check({"loss": 1.0, "losss": 1.0, "train/loss": 1.0})
