import logging
import os
import pty
import sys
import termios
from contextlib import suppress

import pytest

from monitoring.console import ConsoleSink, summary

REPORT = {
    "progress_ratio": 0.025,
    "eta_seconds": 18729.4,
    "loss": 6.8123,
    "learning_rate": 3.1e-4,
    "samples_per_second": 18421.4,
    "tokens_per_second": 921000,
    "step_seconds": 0.2223,
    "data_wait_ratio": 0.0135,
    "budget_spent": 38.4,
    "budget_total": 1542,
    "patch_size_pixels": 24,
    "token_dropout_ratio": 0.5,
    "query_tokens": 50,
    "key_tokens": 100,
    "frozen_layers": 3,
}


def test_summary_shows_every_number():
    assert summary(1240, REPORT) == (
        "[   1240   2.5%] eta 5:12:09 | loss 6.8123 | lr 3.10e-04 | 18421 img/s | 921000 tok/s | step 0.222s"
        " | data 1.4% | budget 38.4/1542 | p=24 drop=0.50 tok=50/100 | frozen 3"
    )


def test_summary_leaves_out_what_is_not_known():
    assert " | 921000 tok/s | MFU 41.2% | step" in summary(7, {**REPORT, "mfu_ratio": 0.412})
    assert summary(7, {"knn_top1_ratio": 0.314}) == "[      7] k-NN 31.4%"
    assert "eta" not in summary(7, {**REPORT, "eta_seconds": float("nan")})


def test_off_a_terminal_every_report_is_one_log_line(caplog, capfd):
    caplog.set_level(logging.INFO)
    sink = ConsoleSink()
    sink.write(1240, REPORT)
    sink.write(1241, {"knn_top1_ratio": 0.5})
    sink.close()
    assert caplog.messages == [summary(1240, REPORT), "[   1241] k-NN 50.0%"]
    assert "%|" not in capfd.readouterr().err


def read_all(master):
    """Return what was written to a pseudo-terminal whose other end is closed; Linux says so by EIO."""
    shown = b""
    with os.fdopen(master, "rb", buffering=0) as file, suppress(OSError):
        while chunk := file.read(4096):
            shown += chunk
    return shown.decode()


def test_on_a_terminal_a_bar_shows_the_same_numbers(monkeypatch):
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 200))
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        sink = ConsoleSink()
        sink.write(1240, REPORT)
        sink.close()
    shown = read_all(master)
    assert "2.5%|" in shown
    assert "| eta 5:12:09 | loss 6.8123 | lr" in shown


def test_names_outside_the_catalogue_are_refused():
    sink = ConsoleSink()
    with pytest.raises(AssertionError, match="accuracy"):
        sink.write(1, {"accuracy": 1.0})
    sink.close()
