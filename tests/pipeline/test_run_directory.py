"""What a run's own directory lets others see, and what its log does when it cannot be written."""

import logging
from pathlib import Path

import pytest

from pipeline.compose import load
from pipeline.run_directory import RunDirectory, _log_to


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


def test_a_new_run_is_its_users_alone_until_the_user_shares_it(tmp_path: Path) -> None:
    config = load("train", ["run=a", f"runs={tmp_path / 'runs'}", "budget.value=1"])
    # Whoever created it first.
    config.directory.mkdir(parents=True)
    before = list(logging.getLogger().handlers)
    try:
        RunDirectory(config).open([])
        assert config.directory.stat().st_mode & 0o777 == 0o700
        config.directory.chmod(0o750)
        RunDirectory(config).open([])
        assert config.directory.stat().st_mode & 0o777 == 0o750
    finally:
        for handler in set(logging.getLogger().handlers) - set(before):
            logging.getLogger().removeHandler(handler)
