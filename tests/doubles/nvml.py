"""A driver that answers what a test tells it: NVML's functions, with their own signatures and errors."""

import inspect
from dataclasses import dataclass, field
from types import SimpleNamespace

import pynvml


@dataclass
class Gpu:
    """What NVML says of one; `fails`: the error code that its functions answer with, by name, "" for all."""

    name: str = "NVIDIA H100 80GB HBM3"
    reasons: int = pynvml.nvmlClocksEventReasonGpuIdle
    errors: dict = field(default_factory=lambda: {0: 5, 1: 0})
    fails: dict = field(default_factory=dict)


class Driver:
    """`Driver([Gpu(), ...]).install(setattr)`."""

    def __init__(self, gpus):
        self.gpus, self.calls = gpus, 0

    def install(self, put):
        for name, function in self._functions().items():
            ours, real = inspect.signature(function), inspect.signature(getattr(pynvml, name))
            assert list(ours.parameters) == list(real.parameters), name
            put(pynvml, name, function)

    def _functions(self):
        def of(value):
            def function(handle):
                return value(handle)

            return function

        single = {
            "Name": lambda gpu: gpu.name,
            "UUID": lambda gpu: f"GPU-{self.gpus.index(gpu)}",
            "UtilizationRates": lambda gpu: SimpleNamespace(gpu=75, memory=20),
            "PowerUsage": lambda gpu: 650_500,
            "EnforcedPowerLimit": lambda gpu: 700_000,
            "PcieReplayCounter": lambda gpu: 3,
            "CurrentClocksEventReasons": lambda gpu: gpu.reasons,
        }
        found = {f"nvmlDeviceGet{name}": self._checked(name, of(value)) for name, value in single.items()}

        def memory(handle, version=None):
            return SimpleNamespace(used=60 * 2**30, total=80 * 2**30)

        def temperature(handle, sensor):
            assert sensor == pynvml.NVML_TEMPERATURE_GPU
            return 64

        def clock(handle, type):
            assert type == pynvml.NVML_CLOCK_SM
            return 1755

        def most(handle, type):
            assert type == pynvml.NVML_CLOCK_SM
            return 1980

        def ecc(handle, errorType, counterType):
            assert counterType == pynvml.NVML_VOLATILE_ECC
            return handle.errors[errorType]

        several = {"MemoryInfo": memory, "Temperature": temperature, "ClockInfo": clock, "MaxClockInfo": most}
        several["TotalEccErrors"] = ecc
        found |= {f"nvmlDeviceGet{name}": self._checked(name, function) for name, function in several.items()}

        def by_index(index):
            self.calls += 1
            return self.gpus[index]

        def nothing():
            return None

        return found | {
            "nvmlInit": nothing,
            "nvmlDeviceGetCount": lambda: len(self.gpus),
            "nvmlDeviceGetHandleByIndex": by_index,
        }

    @staticmethod
    def _checked(name, function):
        def checked(handle, *more):
            for failing, code in handle.fails.items():
                if failing in ("", name):
                    raise pynvml.NVMLError(code)
            return function(handle, *more)

        checked.__signature__ = inspect.signature(function)
        return checked
