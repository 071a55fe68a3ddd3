"""Exporters as processes: what they leave where Prometheus looks, and how they end."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pynvml
import pytest

from monitoring.exporters.service import ExporterConfig
from pipeline.cli import dispatch

ROOT = Path(__file__).parents[3]
# The command of a user, over the driver of the tests.
WITH_GPUS = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from doubles.nvml import Driver, Gpu
Driver([Gpu(), Gpu()]).install(setattr)
from pipeline.cli import main
main()
"""


@contextmanager
def exporter(tmp_path, *words, **environment):
    script = tmp_path / "exporter.py"
    script.write_text(WITH_GPUS.format(root=str(ROOT), tests=str(ROOT / "tests")))
    env = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | {"SLURMD_NODENAME": "n7"} | environment
    name, *more = words
    command = [sys.executable, script, name, f"runs={tmp_path}", "address=127.0.0.1", *more]
    with subprocess.Popen(
        command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as it:
        try:
            yield it
        finally:
            it.kill()


def published(path, process):
    end = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.05)
    [entry] = json.loads(path.read_text())
    return entry


def scrape(entry):
    return urllib.request.urlopen(f"http://{entry['targets'][0]}/metrics", timeout=10).read().decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_it_is_found_answers_and_takes_its_target_back(tmp_path, number):
    path = tmp_path / ".targets" / "n7-gpu.json"
    with exporter(tmp_path, "gpu-exporter") as process:
        entry = published(path, process)
        assert entry["labels"] == {"job": "coldpress-gpu", "node": "n7", "instance": "n7:gpu"}
        assert 'coldpress_node_gpu_up{gpu="1"} 1.0' in scrape(entry)
        # What schedulers send before they end a job is not for it.
        process.send_signal(signal.SIGUSR2)
        assert 'coldpress_node_gpu_up{gpu="1"} 1.0' in scrape(entry)
        process.send_signal(number)
        assert process.wait(20) == 0
    assert not path.exists()


def test_a_killed_one_is_missed_and_its_successor_not_forgotten(tmp_path):
    path = tmp_path / ".targets" / "n7-gpu.json"
    with exporter(tmp_path, "gpu-exporter") as killed:
        published(path, killed)
        killed.kill()
    assert path.exists()
    path.unlink()
    with exporter(tmp_path, "gpu-exporter") as first:
        published(path, first)
        path.unlink()
        with exporter(tmp_path, "gpu-exporter") as second:
            entry = published(path, second)
            first.terminate()
            assert first.wait(20) == 0
            assert path.exists()
            assert published(path, second) == entry


def test_without_a_driver_it_is_one_sentence(capsys, monkeypatch):
    def missing():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    assert dispatch(["gpu-exporter"]) == 2
    said = capsys.readouterr().err
    assert (
        said == "coldpress: NVML says NVML Shared Library Not Found; start gpu-exporter where nvidia-smi lists GPUs.\n"
    )


def test_without_slurm_it_is_one_sentence(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert dispatch(["slurm-exporter"]) == 2
    said = capsys.readouterr().err
    assert said == "coldpress: no squeue or sinfo on the PATH; start slurm-exporter where Slurm's clients are.\n"


def test_where_it_cannot_listen_or_write_it_is_one_sentence(tmp_path):
    with exporter(tmp_path, "gpu-exporter", "address=192.0.2.1") as process:
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 2
    assert said.startswith("coldpress: address=192.0.2.1 runs=")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"port": 70000}, r"^port must be in \[0, 65535\], got 70000; 0 takes any free port.$"),
        ({"every_seconds": 0.5}, "^every_seconds must be at least 1, got 0.5; 5 to 60 are usual.$"),
    ],
)
def test_impossible_keys_are_refused(keys, sentence):
    with pytest.raises(ValueError, match=sentence):
        ExporterConfig(**keys)
