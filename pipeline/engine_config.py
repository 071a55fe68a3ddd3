"""How a step is computed, in our words and in DeepSpeed's."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

STAGES = (0, 1, 2, 3)
# The stage at which each process has only a part of the weights.
SHARDED = 3


class Precision(Enum):
    """What networks compute in; optimizer and momentum encoder keep fp32."""

    fp32 = "fp32"
    bf16 = "bf16"


class Offload(Enum):
    """Which part of what ZeRO shards is in the memory of the host; the optimizer then steps there."""

    none = "none"
    # Master weights, moments and the gradients that reach them; stages 1 to 3.
    optimizer = "optimizer"
    # Weights, too, and momentum encoders, which then move there; stage 3.
    parameters = "parameters"


@dataclass
class EngineConfig:
    """How a step is computed."""

    precision: Precision = Precision.bf16
    # Of ZeRO: what is sharded over the processes. 0: nothing, 1: optimizer state, 2: gradients, 3: weights, too.
    stage: int = 1
    # What waits in the memory of the host: less of the GPU's, slower steps. Training is the same up to rounding.
    offload: Offload = Offload.none
    # So many samples of each process go through the networks at once, and gradients add up: less memory, the same step.
    # Only for losses that are means over samples. 0 takes all.
    micro_batch: int = 0
    # Report gradient norms of single layers; one more pass over the gradients.
    layer_norms: bool = False
    # So many steps in a row whose loss or gradient is not finite end the run.
    max_skipped: int = 10
    # DeepSpeed's own options, as in its JSON; what coldpress sets itself is refused.
    deepspeed: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(
                f"engine.stage must be one of {', '.join(map(str, STAGES))}, got {self.stage}; 1 is usual."
            )
        if self.max_skipped < 1:
            raise ValueError(f"engine.max_skipped must be at least 1 step, got {self.max_skipped}; 10 is usual.")
        if self.micro_batch < 0:
            raise ValueError(f"engine.micro_batch must be at least 0 samples, got {self.micro_batch}; 0 takes all.")
        if self.micro_batch and self.stage == 0 and self.precision is Precision.bf16:
            raise ValueError(
                f"engine.micro_batch={self.micro_batch} would add gradients up in bf16 at engine=zero0, "
                "which loses small ones; take engine=zero1, or engine.precision=fp32."
            )
        self._check_offload()
        _check_free("engine.deepspeed", self.deepspeed, _own_options(self, max(1, self.micro_batch), 0.0))

    def _check_offload(self) -> None:
        if self.offload is not Offload.none and self.stage == 0:
            raise ValueError(
                f"engine.offload must be none with engine=zero0, which shards nothing, got {self.offload.value}; "
                "take engine=zero1."
            )
        if self.offload is Offload.parameters and self.stage != SHARDED:
            raise ValueError(
                f"engine.offload=parameters needs weights that are sharded, got engine=zero{self.stage}; "
                "take engine=zero3, or engine.offload=optimizer."
            )


@dataclass
class Zero0(EngineConfig):
    """Every process keeps everything."""

    stage: int = 0


@dataclass
class Zero2(EngineConfig):
    """Optimizer state and gradients are sharded."""

    stage: int = 2


@dataclass
class Zero3(EngineConfig):
    """Weights are sharded, too, those of momentum encoders among them."""

    stage: int = 3


@dataclass
class FSDP2(EngineConfig):
    """All of it is sharded as at ZeRO 3, by PyTorch's fully_shard in DeepSpeed's place."""

    stage: int = SHARDED

    def __post_init__(self) -> None:
        if self.stage != SHARDED:
            raise ValueError(
                f"engine.stage is ZeRO's and must be left out with engine=fsdp2, got {self.stage}; "
                f"take it out, or say engine=zero{self.stage}."
            )
        if self.deepspeed:
            raise ValueError(
                f"engine.deepspeed must be empty with engine=fsdp2, which does without DeepSpeed, "
                f"got {sorted(self.deepspeed)}; take it out, or say engine=zero3."
            )
        if self.offload is not Offload.none:
            raise ValueError(
                f"engine.offload must be none with engine=fsdp2, got {self.offload.value}; "
                "say engine=zero3 to have it on the host."
            )
        super().__post_init__()


def deepspeed_options(engine: EngineConfig, local_batch: int, clip: float) -> dict[str, Any]:
    """Return DeepSpeed's configuration: what coldpress sets, and what the user passes through."""
    return merged(_own_options(engine, local_batch, clip), engine.deepspeed)


def _own_options(engine: EngineConfig, local_batch: int, clip: float) -> dict[str, Any]:
    micro_batch = engine.micro_batch or local_batch
    options: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": local_batch // micro_batch,
        "gradient_clipping": clip,
        "steps_per_print": 10**9,
        "zero_optimization": _zero_options(engine.stage) | _offload_options(engine.offload),
    }
    if engine.offload is not Offload.none:
        # DeepSpeed asks for its own Adam on the host. PyTorch's fused one is as fast (27 against 26 ms for 20 million
        # weights on one core), is not compiled at the first start, and counts its steps as everywhere else.
        options["zero_force_ds_cpu_optimizer"] = False
    if engine.precision is Precision.bf16:
        options |= {
            "bf16": {"enabled": True},
            # At stage 0 gradients are bf16 from the backward to the step, and DeepSpeed takes nothing else.
            "data_types": {"grad_accum_dtype": "fp32" if engine.stage else "bf16"},
            "communication_data_type": "fp32",
        }
    return options


def merged(options: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Return options with more of them put in at any depth; what both have is the second's."""
    both = [key for key in more if isinstance(options.get(key), dict) and isinstance(more[key], dict)]
    nested = {key: merged(options[key], more[key]) for key in both}
    return options | more | nested


def _zero_options(stage: int) -> dict[str, Any]:
    # The default bucket of 5e8 elements would take gigabytes for a ViT. (In bf16 DeepSpeed reduces its flat fp32
    # gradients as a whole at stage 1 and does not look at these.)
    options: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": 20_000_000,
        "allgather_bucket_size": 200_000_000,
    }
    if stage == SHARDED:
        options |= {
            "stage3_prefetch_bucket_size": 20_000_000,
            # Weights that may stay gathered, or because they are used again soon. By default 1e9, all of a ViT.
            "stage3_max_live_parameters": 40_000_000,
            "stage3_max_reuse_distance": 20_000_000,
            # Above 0 small tensors stay gathered, out of reach of what is written to a momentum encoder's shards, and
            # are gathered one by one at each step.
            "stage3_param_persistence_threshold": 0,
            # It would replace torch.nn.functional.linear for the whole process, with other rounding.
            "memory_efficient_linear": False,
        }
    return options


def _offload_options(offload: Offload) -> dict[str, Any]:
    # Pinned: copies of pageable memory would wait for one another.
    host = {"device": "cpu", "pin_memory": True}
    kept = {Offload.none: (), Offload.optimizer: ("optimizer",), Offload.parameters: ("optimizer", "param")}
    return {f"offload_{what}": dict(host) for what in kept[offload]}


# What coldpress sets that may be tuned all the same: sizes, which change no result.
_TUNABLE = {
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance",
    "steps_per_print",
}
# What coldpress decides by keys of its own, or does itself.
_OURS = {
    "train_batch_size": "batch_size",
    "optimizer": "optim",
    "scheduler": "rate",
    "fp16": "engine.precision",
    "amp": "engine.precision",
    "torch_autocast": "engine.precision",
    "checkpoint": "checkpoint",
    "compression_training": "compression",
    "data_efficiency": "compression",
    "curriculum_learning": "compression",
    "zero_optimization.offload_optimizer": "engine.offload",
    "zero_optimization.offload_param": "engine.offload",
    # As they were once called; DeepSpeed still understands them.
    "zero_optimization.cpu_offload": "engine.offload",
    "zero_optimization.cpu_offload_param": "engine.offload",
}
# What keeps weights or gradients where momentum encoders, norms and checkpoints do not look for them.
_UNSUPPORTED = {
    f"zero_optimization.{name}"
    for name in (
        "zenflow",
        "zero_hpz_partition_size",
        "zero_quantized_weights",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_gradients",
        "mics_shard_size",
    )
}


def _check_free(path: str, given: dict[str, Any], ours: dict[str, Any], inside: str = "") -> None:
    """Refuse by name what coldpress sets itself."""
    for key, value in given.items():
        name = f"{inside}{key}"
        if name in _OURS:
            raise ValueError(f"{path}.{name} is decided by {_OURS[name]} in coldpress; take it out.")
        if name in _UNSUPPORTED:
            raise ValueError(
                f"{path}.{name} does not go with coldpress's checkpoints and momentum encoders; take it out."
            )
        if name not in _TUNABLE and key in ours:
            if isinstance(value, dict) and isinstance(ours[key], dict):
                _check_free(path, value, ours[key], f"{name}.")
            else:
                raise ValueError(f"{path}.{name} is set by coldpress from keys of its own; take it out.")
