"""Command: what NVML knows of the GPUs of this node, for Prometheus; one process a node."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import pynvml as nvml

from monitoring.exporters.reading import Cached, Reading
from monitoring.exporters.service import ExporterConfig, serve
from monitoring.metrics import GPUS

log = logging.getLogger(__name__)

MEGA, MILLI = 1e6, 1e-3
THROTTLES = {
    "gpu_idle": nvml.nvmlClocksEventReasonGpuIdle,
    "clocks_setting": nvml.nvmlClocksEventReasonApplicationsClocksSetting,
    "sw_power_cap": nvml.nvmlClocksEventReasonSwPowerCap,
    "hw_slowdown": nvml.nvmlClocksThrottleReasonHwSlowdown,
    "sync_boost": nvml.nvmlClocksEventReasonSyncBoost,
    "sw_thermal_slowdown": nvml.nvmlClocksEventReasonSwThermalSlowdown,
    "hw_thermal_slowdown": nvml.nvmlClocksThrottleReasonHwThermalSlowdown,
    "hw_power_brake": nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
    "display_clocks": nvml.nvmlClocksEventReasonDisplayClockSetting,
}
ECC = {"corrected": nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, "uncorrected": nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED}
# What a GPU does not have is left out; any other error is one of the GPU.
ABSENT = (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound, nvml.NVMLError_NoPermission)


@dataclass
class GpuExporterConfig(ExporterConfig):
    """The exporter of this node's GPUs."""


def run(config: GpuExporterConfig) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ValueError: this machine has no driver of NVIDIA's, or no GPU that it lets this user see.
    """
    try:
        nvml.nvmlInit()
        count = nvml.nvmlDeviceGetCount()
    except nvml.NVMLError as error:
        raise ValueError(f"NVML says {error}; start gpu-exporter where nvidia-smi lists GPUs.") from error
    if not count:
        raise ValueError("NVML lists no GPU; start gpu-exporter where nvidia-smi lists GPUs.")
    serve(Cached(GpuReader(count).read, config.every_seconds), config, "gpu")


class GpuReader:
    """Reads every GPU; what one of them fails at does not concern the others."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._lost: set[int] = set()

    def read(self) -> Reading:
        """Return what NVML says now."""
        reading = Reading(GPUS)
        for number in range(self._count):
            reading.add("node_gpu_up", float(self._answers(reading, number)), str(number))
        reading.add("node_gpu_read_timestamp_seconds", time.time())
        return reading

    def _answers(self, reading: Reading, number: int) -> bool:
        try:
            _read_gpu(reading, str(number), nvml.nvmlDeviceGetHandleByIndex(number))
        except nvml.NVMLError as error:
            if number not in self._lost:
                log.warning("GPU %d does not answer: %s", number, error)
            self._lost.add(number)
            return False
        self._lost.discard(number)
        return True


def _read_gpu(reading: Reading, gpu: str, handle: object) -> None:
    """Read one GPU.

    Raises:
        NVMLError: it does not answer.
    """
    reading.add("node_gpu_info", 1, gpu, nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetUUID(handle))

    def add(name: str, value: Callable[[], float], *labels: str) -> None:
        with suppress(*ABSENT):
            reading.add(name, value(), gpu, *labels)

    add("node_gpu_utilization_ratio", lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
    add("node_gpu_memory_used_bytes", lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used)
    add("node_gpu_memory_total_bytes", lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total)
    add("node_gpu_power_watts", lambda: nvml.nvmlDeviceGetPowerUsage(handle) * MILLI)
    add("node_gpu_power_limit_watts", lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) * MILLI)
    add("node_gpu_temperature_celsius", lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
    add("node_gpu_sm_clock_hertz", lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM) * MEGA)
    add("node_gpu_sm_clock_max_hertz", lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM) * MEGA)
    add("node_gpu_pcie_replays_total", lambda: nvml.nvmlDeviceGetPcieReplayCounter(handle))
    for kind, code in ECC.items():
        add("node_gpu_ecc_errors_total", lambda code=code: _ecc_errors(handle, code), kind)  # type: ignore[misc]
    with suppress(*ABSENT):
        reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
        for reason, bit in THROTTLES.items():
            reading.add("node_gpu_throttled", float(bool(reasons & bit)), gpu, reason)


def _ecc_errors(handle: object, kind: int) -> int:
    # Volatile: since the driver was loaded. What the board remembers for life says nothing of today.
    errors: int = nvml.nvmlDeviceGetTotalEccErrors(handle, kind, nvml.NVML_VOLATILE_ECC)
    return errors
