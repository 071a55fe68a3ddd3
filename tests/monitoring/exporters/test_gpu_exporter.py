"""The exporter of a node's GPUs over a driver of the test; HTTP, files and signals are real."""

import logging
import subprocess

import pynvml
import pytest
from doubles.nvml import Driver, Gpu
from prometheus_client import CollectorRegistry, generate_latest

from monitoring.exporters.gpu_exporter import THROTTLES, GpuExporterConfig, GpuReader, run
from monitoring.exporters.reading import Cached
from monitoring.metrics import GPUS, PREFIX


@pytest.fixture
def driver(monkeypatch):
    driver = Driver([Gpu(), Gpu(reasons=pynvml.nvmlClocksThrottleReasonHwThermalSlowdown)])
    driver.install(monkeypatch.setattr)
    return driver


def said(reader):
    registry = CollectorRegistry()
    registry.register(Cached(reader.read, 1))
    text = generate_latest(registry).decode()
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return text, {name.removeprefix(PREFIX): float(value) for name, _, value in lines}


def test_every_number_has_its_unit_and_gpu(driver, program):
    text, found = said(GpuReader(2))
    assert {name.split("{")[0] for name in found} == set(GPUS)
    for metric in GPUS.values():
        assert f"# TYPE {PREFIX}{metric.name} {metric.kind}\n" in text
    expected = {
        "up": 1,
        "utilization_ratio": 0.75,
        "memory_used_bytes": 60 * 2**30,
        "memory_total_bytes": 80 * 2**30,
        "power_watts": 650.5,
        "power_limit_watts": 700,
        "temperature_celsius": 64,
        "sm_clock_hertz": 1.755e9,
        "sm_clock_max_hertz": 1.98e9,
        "pcie_replays_total": 3,
    }
    for gpu in "01":
        assert {name: found[f'node_gpu_{name}{{gpu="{gpu}"}}'] for name in expected} == expected
        assert found[f'node_gpu_ecc_errors_total{{gpu="{gpu}",kind="corrected"}}'] == 5
        assert found[f'node_gpu_info{{gpu="{gpu}",name="NVIDIA H100 80GB HBM3",uuid="GPU-{gpu}"}}'] == 1
    check = subprocess.run([program("promtool"), "check", "metrics"], input=text, text=True, capture_output=True)
    assert not check.stderr.strip()


def test_reasons_are_always_the_same_few(driver):
    _, found = said(GpuReader(2))
    throttled = {name: value for name, value in found.items() if name.startswith("node_gpu_throttled")}
    assert len(throttled) == 2 * len(THROTTLES)
    assert sum(THROTTLES.values()) == pynvml.nvmlClocksEventReasonAll
    assert [name for name, value in throttled.items() if value] == [
        'node_gpu_throttled{gpu="0",reason="gpu_idle"}',
        'node_gpu_throttled{gpu="1",reason="hw_thermal_slowdown"}',
    ]


@pytest.mark.parametrize("where", ["", "Temperature"])
def test_a_gpu_that_fell_off_takes_nobody_along_and_may_come_back(driver, where, caplog):
    reader = GpuReader(2)
    driver.gpus[0].fails[where] = pynvml.NVML_ERROR_GPU_IS_LOST
    for _ in range(2):
        _, found = said(reader)
        assert (found['node_gpu_up{gpu="0"}'], found['node_gpu_up{gpu="1"}']) == (0, 1)
        assert found['node_gpu_power_watts{gpu="1"}'] == 650.5
    [line] = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert line == "GPU 0 does not answer: GPU is lost"
    driver.gpus[0].fails.clear()
    assert said(reader)[1]['node_gpu_up{gpu="0"}'] == 1


def test_what_a_gpu_does_not_have_is_left_out(driver):
    driver.gpus[1].fails |= dict.fromkeys(
        ("TotalEccErrors", "CurrentClocksEventReasons"), pynvml.NVML_ERROR_NOT_SUPPORTED
    )
    _, found = said(GpuReader(2))
    missing = ('node_gpu_ecc_errors_total{gpu="1"', 'node_gpu_throttled{gpu="1"')
    assert not [name for name in found if name.startswith(missing)]
    assert found['node_gpu_up{gpu="1"}'] == 1


def test_without_a_gpu_it_is_refused(driver):
    driver.gpus.clear()
    with pytest.raises(ValueError, match=r"^NVML lists no GPU; start gpu-exporter where nvidia-smi lists GPUs\.$"):
        run(GpuExporterConfig())
