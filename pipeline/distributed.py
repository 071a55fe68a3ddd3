"""Processes: who we are, how we talk, and what is computed over the global batch."""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.allocator import keep_freed_memory
from pipeline.preemption import EXIT_HUNG, ProcessFailedError

# srun, unlike torchrun, names these differently.
SLURM_NAMES = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}
T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Return whether this process speaks for all."""
        return self.rank == 0


def start() -> World:
    """Join the process group that torchrun, deepspeed or srun describes, or make one of our own.

    Raises:
        ValueError: the environment describes a process group only in part.
        ProcessFailedError: they cannot meet; another try may go better.
    """
    _complete_environment()
    rank, local_rank, size = (int(os.environ[k]) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # With one visible device per task, as srun --gpus-per-task gives, the local rank is not its number.
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if not dist.is_initialized():
        # gloo beside nccl: flags and strings travel on the CPU without a device synchronization.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=TIMEOUT)
        except dist.DistError as error:
            raise ProcessFailedError(_not_met(rank, str(error)), EXIT_HUNG) from error
        atexit.register(stop)
    return World(rank, local_rank, size, device)


def _not_met(rank: int, error: str) -> str:
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    reason = "somebody else listens there" if "EADDRINUSE" in error else error.partition("\n")[0]
    return f"process {rank} on {host()} cannot meet the others at {place}: {reason}; try again, or set MASTER_PORT."


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _complete_environment() -> None:
    env = os.environ
    if "RANK" not in env and "SLURM_STEP_NODELIST" in env and int(env["SLURM_NTASKS"]) > 1:
        env.update({ours: env[theirs] for ours, theirs in SLURM_NAMES.items()})
        # "2(x3)" is two on each of three nodes; the data loader divides the cores by it.
        env.setdefault("LOCAL_WORLD_SIZE", env["SLURM_STEP_TASKS_PER_NODE"].split("(")[0].split(",")[0])
        env.setdefault("MASTER_ADDR", _first_host(env["SLURM_STEP_NODELIST"]))
        env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 10000))
    if "RANK" not in env:
        env.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    missing = [k for k in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if k not in env]
    if missing:
        raise ValueError(
            f"RANK={env['RANK']} is set but {', '.join(missing)} is not; "
            "start with torchrun, deepspeed or srun, or unset RANK to run alone."
        )


def _first_host(nodelist: str) -> str:
    command = ["scontrol", "show", "hostnames", nodelist]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def world_size() -> int:
    """Return the number of processes, 1 when none were started."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, 0 when none were started."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather(tensor: Tensor) -> Tensor:
    """Concatenate every process's equally shaped [B, ...] in rank order; no gradient flows."""
    if world_size() == 1:
        return tensor
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, tensor: Tensor) -> Tensor:
        return gather(tensor)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        # Every process used our rows: their gradients add up.
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(world_size())[rank()]


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """Concatenate every process's [B, ...] in rank order; gradients return to where rows came from."""
    if world_size() == 1:
        return tensor
    gathered: Tensor = _GatherWithGradient.apply(tensor)
    return gathered


def mean_over_ranks(value: Tensor) -> Tensor:
    """Return the mean of a detached tensor over all processes."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
        value /= world_size()
    return value


def sum_over_ranks(value: float) -> float:
    """Return the sum of a number over all processes."""
    if world_size() == 1:
        return float(value)
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)


def sum_tensor(value: Tensor) -> Tensor:
    """Return the sum of a detached tensor over all processes."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """Return for each flag whether it is set on at least one process. All processes must call this together."""
    if world_size() == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return tuple(bool(vote) for vote in votes)


def from_main(value: T) -> T:
    """Return rank 0's value on every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def first_text(text: str) -> str:
    """Return the text of the first process that has one. All processes must call this together."""
    if world_size() == 1:
        return text
    texts = [""] * world_size()
    dist.all_gather_object(texts, text)
    return next(filter(None, texts), "")


def on_main(action: Callable[[], T]) -> T | None:
    """Run an action on rank 0 alone and return its result there, None elsewhere.

    Raises:
        ValueError: the action did; every process raises it, so none is left waiting.
    """
    result, refusal = None, ""
    if rank() == 0:
        try:
            result = action()
        except ValueError as error:
            refusal = str(error)
    refusal = from_main(refusal)
    if refusal:
        raise ValueError(refusal)
    return result


def meeting() -> str:
    """Say on which nodes the processes are, and how they met. All processes must call this together."""
    if world_size() == 1:
        return f"on node {host()}"
    hosts = [""] * world_size()
    dist.all_gather_object(hosts, host())
    nodes = list(dict.fromkeys(hosts))
    named = ", ".join(nodes[:4]) + (", ..." if len(nodes) > 4 else "")
    interfaces = [os.environ[name] for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME") if os.environ.get(name)]
    by_way = f" by way of {', '.join(dict.fromkeys(interfaces))}" if interfaces else ""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return f"on {len(nodes)} node(s) ({named}), met at {where}{by_way}"


def host() -> str:
    """Return the name of this node, Slurm's if it has one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0]


def barrier() -> None:
    """Wait until every process is here."""
    any_rank(False)


def at_least_fp32(x: Tensor) -> Tensor:
    """Return the tensor in fp32, or in fp64 if that is what it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class GlobalBatchNorm(nn.BatchNorm1d):
    """Batch normalization over the global batch, on any device (SyncBatchNorm needs a GPU).

    Statistics are computed in fp32 from each process's mean and variance, combined without cancellation; every
    process must bring the same number of rows. Input and output are [B, D]. There are no running statistics: heads
    are never evaluated, and so a forward changes nothing.
    """

    def __init__(self, num_features: int, *, affine: bool = True) -> None:
        super().__init__(num_features, affine=affine, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize by the global batch."""
        exact = at_least_fp32(x)
        mean, var = self._global_statistics(exact)
        normalized = (exact - mean) * torch.rsqrt(var + self.eps)
        if self.affine:
            normalized = normalized * self.weight + self.bias
        return normalized.to(x.dtype)

    @staticmethod
    def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        var, mean = torch.var_mean(x, dim=0, correction=0)
        means, variances = gather_with_gradient(torch.stack([mean, var])[None]).unbind(1)
        mean = means.mean(0)
        return mean, variances.mean(0) + (means - mean).square().mean(0)
