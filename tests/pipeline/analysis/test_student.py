"""Quantiles of Student's t, against scipy."""

import pytest
from scipy.stats import t

from pipeline.analysis.student import two_sided


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 30, 31, 127, 1023])
@pytest.mark.parametrize("confidence", [0.1, 0.5, 0.95, 0.99, 0.9999])
def test_quantiles_are_scipys(degrees: int, confidence: float) -> None:
    assert two_sided(confidence, degrees) == pytest.approx(t.ppf((1 + confidence) / 2, degrees), rel=1e-9)


def test_no_confidence_is_no_width() -> None:
    assert two_sided(0.0, 10) == 0
