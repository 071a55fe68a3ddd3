"""The DeepSpeed door: one optimizer step under ZeRO, per-layer rates, frozen layers, clipping, engine shards."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.gradients import TensorNorms
from pipeline.methods.base import Batch, Method
from pipeline.optim import HEADS, LAST_LAYER, VECTORS, OptimConfig, adamw, layer_name, parameter_groups
from pipeline.schedules import StepPlan

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Checkpoints are data: DeepSpeed must not unpickle code out of them.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
warnings.filterwarnings("ignore", category=FutureWarning, module=r"deepspeed|torch")

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler  # noqa: E402
from deepspeed.runtime.zero.config import ZeroStageEnum  # noqa: E402
from deepspeed.utils.tensor_fragment import fragment_address  # noqa: E402

# What of DeepSpeed's own could be compiled here: nothing. Asked for, the table compiles test programs, whose commands
# land on the screen; and what it lists is compiled at the first start (up to 100 s), for inference only.
deepspeed.ops.__compatible_ops__ = {}
torch.serialization.add_safe_globals([LossScaler, DynamicLossScaler, fragment_address, ZeroStageEnum])
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

CLIENT_KEY = "coldpress"


class Precision(Enum):
    """What networks compute in; optimizer and momentum encoder keep fp32."""

    fp32 = "fp32"
    bf16 = "bf16"


@dataclass
class EngineConfig:
    """How a step is computed: ZeRO stage 1, optimizer state sharded over the processes."""

    precision: Precision = Precision.bf16
    # Report gradient norms of single layers; one more pass over the gradients.
    layer_norms: bool = False
    # So many steps in a row whose loss or gradient is not finite end the run.
    max_skipped: int = 10

    def __post_init__(self) -> None:
        if self.max_skipped < 1:
            raise ValueError(f"engine.max_skipped must be at least 1 step, got {self.max_skipped}; 10 is usual.")


@dataclass(frozen=True)
class StepResult:
    """What one step leaves to look at; tensors are not synchronized with the host."""

    loss: Tensor
    metrics: dict[str, Tensor]
    applied: bool


class Engine:
    """Trains a method one plan at a time."""

    def __init__(
        self,
        method: Method,
        config: EngineConfig,
        optim: OptimConfig,
        *,
        local_batch: int,
        device: torch.device,
    ) -> None:
        self.method = method.to(device)
        self._config, self._optim = config, optim
        self._layers = method.layers()
        self._last_layer = [p for p in method.last_layer() if p.requires_grad]
        self._frozen_layers = 0
        groups = parameter_groups(
            self._layers, method.parameters(), self._last_layer, decay_vectors=optim.decay_vectors
        )
        self._engine, *_ = deepspeed.initialize(
            model=method,
            optimizer=adamw(groups, optim),
            config=_deepspeed_config(config.precision, local_batch, optim.clip),
            dist_init_required=False,
        )
        dtype = torch.bfloat16 if config.precision is Precision.bf16 else torch.float32
        method.prepare(device, dtype)
        self._norms = TensorNorms(self._engine.optimizer)

    def step(self, batch: Batch, plan: StepPlan) -> StepResult:
        """Run one step on this process's part of the global batch.

        A step whose loss or gradient is not finite on some process changes nothing on any: neither weights nor
        momentum encoder.
        """
        self._freeze(plan)
        self._set_rates(plan)
        output = self._engine(batch, plan)
        self._engine.backward(_nan_gradient_unless_finite(output.loss))
        self._measure_and_clip()
        self._engine.step()
        applied = bool(self._engine.was_step_applied())
        if applied:
            self.method.after_step(plan, output)
        if plan.last_layer_rate == 0.0:
            self._forget_last_layers_steps()
        return StepResult(output.loss.detach(), output.metrics, applied)

    def grad_norm(self) -> float:
        """Return the global gradient norm of the last step, before clipping."""
        if self._optim.clip_each:
            return self._norms.total()
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def layer_norms(self) -> list[float]:
        """Return the last step's gradient norms, before clipping: of every layer in freezing order, then of all heads.

        Empty unless `engine.layer_norms` is on; what is frozen has 0.
        """
        if not self._config.layer_norms:
            return []
        squares = {layer_name(i): 0.0 for i in range(len(self._layers))} | {HEADS: 0.0}
        for group, norm in self._norms.by_group().items():
            name = group.removesuffix(VECTORS)
            squares[name if name in squares else HEADS] += norm**2
        return [square**0.5 for square in squares.values()]

    def save(self, directory: Path) -> None:
        """Write this process's shards into a new directory; every process must call this."""
        self._engine.save_checkpoint(
            str(directory.parent),
            tag=directory.name,
            client_state={CLIENT_KEY: self.method.state()},
            save_latest=False,
        )

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote, with the same number of processes."""
        path, client = self._engine.load_checkpoint(str(directory.parent), tag=directory.name)
        assert path is not None, directory
        # DeepSpeed takes the old run's over.
        self._engine.optimizer.clip_grad = self._optim.clip
        self.method.load(client[CLIENT_KEY])

    def _freeze(self, plan: StepPlan) -> None:
        for parameter in self._last_layer:
            parameter.requires_grad_(plan.last_layer_rate > 0)
        frozen_layers = plan.frozen_layers
        if frozen_layers == self._frozen_layers:
            return
        # A rate of zero alone would keep the backward and, in fp32, the gradient traffic; requires_grad alone would let
        # AdamW's momentum and weight decay go on moving the weights. Both together hold them still bit for bit.
        for parameter in (p for layer in self._layers[:frozen_layers] for p in layer):
            parameter.requires_grad_(False)
            parameter.grad = None
        self._frozen_layers = frozen_layers

    def _set_rates(self, plan: StepPlan) -> None:
        rates = {layer_name(i): rate for i, rate in enumerate(plan.layer_rates)}
        rates |= {HEADS: plan.learning_rate, LAST_LAYER: plan.last_layer_rate}
        for group in self._engine.optimizer.param_groups:
            name = group["name"].removesuffix(VECTORS)
            group["lr"] = rates[name]
            group["weight_decay"] = plan.weight_decay if name == group["name"] else 0.0

    def _measure_and_clip(self) -> None:
        if self._config.layer_norms or self._optim.clip_each:
            self._norms.measure()
        if self._optim.clip_each:
            self._norms.clip(self._optim.clip_each)

    def _forget_last_layers_steps(self) -> None:
        # A flat group counts steps of zero gradients too, and Adam's bias correction would then take its first
        # moments, which start at zero, for long averages: the first updates after the release would be several
        # times too large. What is saved has the zero as well, so a resume needs no memory of the release.
        for group in self._engine.optimizer.param_groups:
            state = self._engine.optimizer.state.get(group["params"][0], {})
            if group["name"].removesuffix(VECTORS) == LAST_LAYER and "step" in state:
                state["step"].zero_()


def _nan_gradient_unless_finite(loss: Tensor) -> Tensor:
    """Return the loss, with a gradient of nan if it is not finite.

    Gradients are averaged, so all processes come to know without a message or a wait of their own.
    """
    return loss * torch.ones_like(loss).where(loss.detach().isfinite(), torch.nan)


def load_method(directory: Path, method: Method) -> None:
    """Load the networks of a checkpoint without an optimizer, for evaluation."""
    saved: dict[str, Any] = torch.load(directory / "mp_rank_00_model_states.pt", weights_only=True, map_location="cpu")
    method.load_state_dict(saved["module"])
    method.load(saved[CLIENT_KEY])


def _deepspeed_config(precision: Precision, local_batch: int, clip: float) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": local_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "steps_per_print": 10**9,
        # The default bucket of 5e8 elements would take gigabytes for a ViT. (In bf16 DeepSpeed reduces its flat
        # fp32 gradients as a whole, frozen layers included, and does not look at these.)
        "zero_optimization": {
            "stage": 1,
            "reduce_bucket_size": 20_000_000,
            "allgather_bucket_size": 200_000_000,
        },
    }
    if precision is Precision.bf16:
        config |= {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    return config
