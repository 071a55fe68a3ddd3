"""Checks of the node, and of the network between the processes."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from data.resources import share_of_cores
from pipeline.checkups.finding import GPU, Finding, fail, ok, warn
from pipeline.distributed import World, barrier, mean_over_ranks

# Distributions whose versions decide about results.
PACKAGES = ("torch", "deepspeed", "timm", "webdataset", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
GIBIBYTE = 2**30
# A process with its libraries, DALI's buffers and a small model.
LEAST_MEMORY = 4 * GIBIBYTE
CLOCK_SECONDS = 2.0
REDUCED_FLOATS = 8 * 2**20
ROUNDS = 5


def packages() -> Finding:
    """Tell which versions are installed."""
    found = {name: each for name in PACKAGES if (each := _version(name))}
    said = ", ".join(f"{name} {each}" for name, each in found.items())
    if not any(name.startswith("nvidia-dali") for name in found):
        return fail("packages", f"{said}; DALI is missing", "install nvidia-dali-cuda130, which has a CPU part, too")
    return ok("packages", f"Python {platform.python_version()}, {said}")


def gpu(world: World) -> Finding:
    """Tell which GPU this process has."""
    if world.device.type == "cuda":
        properties = torch.cuda.get_device_properties(world.device)
        memory = f"{properties.total_memory / GIBIBYTE:.0f} GiB"
        return ok(GPU, f"{properties.name}, {memory}, CUDA {torch.version.cuda}")
    if shutil.which("nvidia-smi"):
        return fail(
            GPU,
            "the driver is there, but PyTorch sees no GPU",
            "ask Slurm for it (--gpus-per-node), and compare nvidia-smi's CUDA version with PyTorch's",
        )
    return warn(GPU, "none: everything runs on the CPU", "fine for trying things; else ask for --gpus-per-node")


def cores() -> Finding:
    """Tell how many cores this process has for DALI and PyTorch."""
    mine = share_of_cores()
    if mine < 2:
        return warn(
            "cores", f"{mine} for this process", "images are decoded and trained on in turn; ask for --cpus-per-task"
        )
    return ok("cores", f"{mine} for each process")


def memory(processes_here: int) -> Finding:
    """Tell how much memory of the host there is for each process of the node."""
    mine = available_memory() / processes_here
    said = f"{mine / GIBIBYTE:.1f} GiB for each process"
    if mine < LEAST_MEMORY:
        return warn("memory", said, "ask for --mem=0, or start fewer processes on a node")
    return ok("memory", said)


def available_memory() -> int:
    """Return the bytes that may still be allocated on this node, within the limit of a job."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return min([free, *_left_in_cgroups(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup").read_text())])


def _left_in_cgroups(root: Path, membership: str) -> Iterator[int]:
    """Yield what the cgroup of a process (version 2) and those around it still allow, each that has a limit."""
    own = next((line.removeprefix("0::/") for line in membership.splitlines() if line.startswith("0::/")), "")
    for group in (root / own, *(root / own).parents):
        limit = group / "memory.max"
        if limit.is_file() and (text := limit.read_text().strip()) != "max":
            yield int(text) - int((group / "memory.current").read_text())


def clock(world: World) -> Finding:
    """Compare the clocks of the processes. Every process must call this."""
    barrier()
    now = torch.zeros(world.size, dtype=torch.float64)
    now[world.rank] = time.time() * world.size
    # A sum: every process fills its own place.
    times = mean_over_ranks(now)
    apart = float(times[world.rank] - times.median())
    if abs(apart) > CLOCK_SECONDS:
        return warn("clock", f"{apart:+.1f} s from the others", "set it by NTP: dashboards and file times depend on it")
    return ok("clock", f"within {float(times.max() - times.min()):.3f} s of each other")


def network(world: World) -> Finding:
    """Measure an all-reduce of 32 MiB, as gradients need it, and of a number. Every process must call this."""
    if world.size == 1:
        return ok("network", "one process, which needs none")
    latency = _fastest(torch.zeros(1, device=world.device))
    seconds = _fastest(torch.zeros(REDUCED_FLOATS, device=world.device))
    # Each process sends and receives so much of it (ring).
    sent = 4 * REDUCED_FLOATS * 2 * (world.size - 1) / world.size
    rate = sent / seconds / 1e9
    said = f"all-reduce at {rate:.2f} GB/s each way, {1e6 * latency:.0f} us for a number"
    if world.device.type == "cuda" and rate < 1:
        return warn("network", said, "the wrong interface? set NCCL_SOCKET_IFNAME, or COLDPRESS_INTERFACE under Slurm")
    return ok("network", said)


def _fastest(tensor: torch.Tensor) -> float:
    """Return the seconds of the fastest of a few all-reduces."""
    times = []
    for _ in range(ROUNDS):
        barrier()
        begin = time.perf_counter()
        mean_over_ranks(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
