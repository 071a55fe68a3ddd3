"""What a run's own log does when it cannot be written."""

import logging
from pathlib import Path

import pytest

from pipeline.run_directory import _log_to


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_log_that_does_not_fit_its_disk_leaves_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    before = list(logging.getLogger().handlers)
    _log_to(Path("/dev/full"))
    (ours,) = (handler for handler in logging.getLogger().handlers if handler not in before)
    try:
        logging.getLogger("pipeline.train").warning("resumed at step %d", 9)
    finally:
        logging.getLogger().removeHandler(ours)
    assert "Traceback" not in "".join(capsys.readouterr())
