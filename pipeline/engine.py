"""The DeepSpeed door: one optimizer step under ZeRO, per-layer rates, frozen layers, clipping, engine shards."""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import optimizer_state
from pipeline.gradients import TensorNorms
from pipeline.heartbeat import UNWATCHED, Heartbeat, Phase
from pipeline.methods.base import Batch, Method
from pipeline.optim import (
    HEADS,
    LAST_LAYER,
    VECTORS,
    OptimConfig,
    adamw,
    attached_name,
    layer_name,
    parameter_groups,
)
from pipeline.schedules import StepPlan

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Checkpoints are data: DeepSpeed must not unpickle code out of them.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
warnings.filterwarnings("ignore", category=FutureWarning, module=r"deepspeed|torch")

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402
import deepspeed.runtime.bf16_optimizer  # noqa: E402
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler  # noqa: E402
from deepspeed.runtime.zero.config import ZeroStageEnum  # noqa: E402
from deepspeed.utils.tensor_fragment import fragment_address  # noqa: E402

# What of DeepSpeed's own could be compiled here: nothing. Asked for, the table compiles test programs, whose commands
# land on the screen; and what it lists is compiled at the first start (up to 100 s), for inference only.
deepspeed.ops.__compatible_ops__ = {}
# It prints pages on memory, collects garbage for them, and resets the peak that others measure.
deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None
torch.serialization.add_safe_globals([LossScaler, DynamicLossScaler, fragment_address, ZeroStageEnum])
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

CLIENT_KEY = "coldpress"
FROZEN_KEY = "coldpress_frozen_layers"
log = logging.getLogger(__name__)

STAGES = (0, 1, 2)


class Precision(Enum):
    """What networks compute in; optimizer and momentum encoder keep fp32."""

    fp32 = "fp32"
    bf16 = "bf16"


@dataclass
class EngineConfig:
    """How a step is computed."""

    precision: Precision = Precision.bf16
    # Of ZeRO: what is sharded over the processes. 0: nothing, 1: optimizer state, 2: gradients, too.
    stage: int = 1
    # Report gradient norms of single layers; one more pass over the gradients.
    layer_norms: bool = False
    # So many steps in a row whose loss or gradient is not finite end the run.
    max_skipped: int = 10

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(
                f"engine.stage must be one of {', '.join(map(str, STAGES))}, got {self.stage}; 1 is usual."
            )
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
        self._config, self._optim, self._local_batch = config, optim, local_batch
        self._layers, self._attached = method.layers(), method.attached()
        self._last_layer = [p for p in method.last_layer() if p.requires_grad]
        self._frozen_layers = 0
        self._start()
        dtype = torch.bfloat16 if config.precision is Precision.bf16 else torch.float32
        method.prepare(device, dtype)

    def step(self, batch: Batch, plan: StepPlan, heartbeat: Heartbeat = UNWATCHED) -> StepResult:
        """Run one step on this process's part of the global batch.

        A step whose loss or gradient is not finite on some process changes nothing on any: neither weights nor
        momentum encoder.
        """
        heartbeat.enter(Phase.forward)
        self.freeze(plan.frozen_layers)
        for parameter in self._last_layer:
            parameter.requires_grad_(plan.last_layer_rate > 0)
        self._set_rates(plan)
        output = self._engine(batch, plan)
        heartbeat.enter(Phase.backward)
        self._engine.backward(_nan_gradient_unless_finite(output.loss))
        heartbeat.enter(Phase.step)
        self._measure_and_clip()
        finite = self._drop_unless_finite()
        self._engine.step()
        applied = finite and bool(self._engine.was_step_applied())
        if applied:
            self.method.after_step(plan, output)
        if plan.last_layer_rate == 0.0:
            self._forget_last_layers_steps()
        return StepResult(output.loss.detach(), output.metrics, applied)

    def freeze(self, frozen_layers: int) -> None:
        """Let go of the first layers: no gradient, no traffic, no optimizer state.

        What still learns keeps all of its own, to the bit. Every step does this by itself; who calls it otherwise must
        do so on every process, since DeepSpeed broadcasts weights when it starts anew.
        """
        assert frozen_layers >= self._frozen_layers, "a frozen layer does not learn again"
        if frozen_layers == self._frozen_layers:
            return
        begin = time.perf_counter()
        for parameter in self._gone(frozen_layers):
            parameter.requires_grad_(False)
            parameter.grad = None
        # A last layer that still waits must not be taken for frozen.
        for parameter in self._last_layer:
            parameter.requires_grad_(True)
        self._frozen_layers = frozen_layers
        kept = optimizer_state.take(self._engine, self._live_names())
        optimizer_state.retire(self._engine)
        del self._engine, self._norms
        self._start()
        optimizer_state.put(self._engine, kept)
        seconds = time.perf_counter() - begin
        log.info(
            "frozen: %d of %d layers; the optimizer let go of them in %.2f s", frozen_layers, len(self._layers), seconds
        )

    def optimizer_bytes(self) -> int:
        """Return the size of the master weights and moments that this process keeps."""
        return optimizer_state.num_bytes(self._engine)

    def grad_norm(self) -> float:
        """Return the global gradient norm of the last step, before clipping."""
        if self._optim.clip_each or self._plain:
            return self._norms.total()
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def layer_norms(self) -> list[float]:
        """Return the last step's gradient norms, before clipping: of every layer in freezing order, then of all else.

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
            client_state={CLIENT_KEY: self.method.state(), FROZEN_KEY: self._frozen_layers},
            save_latest=False,
        )

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote, with the same number of processes."""
        # The optimizer that saved had no place for what was frozen.
        self.freeze(_model_states(directory).get(FROZEN_KEY, 0))
        path, client = self._engine.load_checkpoint(str(directory.parent), tag=directory.name)
        assert path is not None, directory
        # DeepSpeed takes the old run's over.
        self._engine.optimizer.clip_grad = self._optim.clip
        self.method.load(client[CLIENT_KEY])

    def _start(self) -> None:
        """Let DeepSpeed take over what learns."""
        groups = parameter_groups(
            self._layers,
            self.method.parameters(),
            self._last_layer,
            self._attached,
            decay_vectors=self._optim.decay_vectors,
        )
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(
            model=self.method,
            optimizer=adamw(groups, self._optim),
            # Its own clipping at stage 0 in fp32 fails without a gradient.
            config=_deepspeed_config(self._config, self._local_batch, 0.0 if self._plain else self._optim.clip),
            dist_init_required=False,
        )
        if self._config.stage == 0 and not self._plain:
            # It took a step without gradients, at a rate of zero, and counted it.
            self._engine.optimizer.optimizer.state.clear()
        self._norms = TensorNorms(self._engine.optimizer)

    def _gone(self, frozen_layers: int) -> Iterator[nn.Parameter]:
        for i in range(frozen_layers):
            yield from self._layers[i]
            yield from self._attached.get(i, [])

    def _live_names(self) -> set[str]:
        gone = {name for i in range(self._frozen_layers) for name in (layer_name(i), attached_name(i))}
        names = {group["name"] for group in self._engine.optimizer.param_groups}
        return {name for name in names if name.removesuffix(VECTORS) not in gone}

    def _set_rates(self, plan: StepPlan) -> None:
        rates = {layer_name(i): rate for i, rate in enumerate(plan.layer_rates)}
        rates |= {attached_name(i): plan.learning_rate for i in self._attached}
        rates |= {HEADS: plan.learning_rate, LAST_LAYER: plan.last_layer_rate}
        for group in self._engine.optimizer.param_groups:
            name = group["name"].removesuffix(VECTORS)
            group["lr"] = rates[name]
            group["weight_decay"] = plan.weight_decay if name == group["name"] else 0.0

    @property
    def _plain(self) -> bool:
        """Return whether PyTorch's own optimizer steps, without DeepSpeed's around it."""
        return self._config.stage == 0 and self._config.precision is Precision.fp32

    def _measure_and_clip(self) -> None:
        if self._config.layer_norms or self._optim.clip_each or self._plain:
            self._norms.measure()
        if self._optim.clip_each:
            self._norms.clip(self._optim.clip_each)
        if self._optim.clip and self._plain:
            self._norms.clip_total(self._optim.clip)

    def _drop_unless_finite(self) -> bool:
        # DeepSpeed's own optimizers skip such a step; PyTorch's skips parameters without a gradient.
        if not self._plain or math.isfinite(self._norms.total()):
            return True
        for parameter in self.method.parameters():
            parameter.grad = None
        return False

    def _forget_last_layers_steps(self) -> None:
        # A flat group counts steps of zero gradients too, and Adam's bias correction would then take its first
        # moments, which start at zero, for long averages: the first updates after the release would be several
        # times too large. What is saved has the zero as well, so a resume needs no memory of the release.
        for group in self._engine.optimizer.param_groups:
            for master in group["params"] if group["name"].removesuffix(VECTORS) == LAST_LAYER else ():
                state = self._engine.optimizer.state.get(master, {})
                if "step" in state:
                    state["step"].zero_()


def _nan_gradient_unless_finite(loss: Tensor) -> Tensor:
    """Return the loss, with a gradient of nan if it is not finite.

    Gradients are averaged, so all processes come to know without a message or a wait of their own.
    """
    return loss * torch.ones_like(loss).where(loss.detach().isfinite(), torch.nan)


def load_method(directory: Path, method: Method) -> None:
    """Load the networks of a checkpoint without an optimizer, for evaluation."""
    saved = _model_states(directory)
    method.load_state_dict(saved["module"])
    method.load(saved[CLIENT_KEY])


def _model_states(directory: Path) -> dict[str, Any]:
    """Return what a checkpoint holds beside the optimizer's state, read when it is looked at."""
    path = directory / "mp_rank_00_model_states.pt"
    saved: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    return saved


def _deepspeed_config(engine: EngineConfig, local_batch: int, clip: float) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": local_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "steps_per_print": 10**9,
        # The default bucket of 5e8 elements would take gigabytes for a ViT. (In bf16 DeepSpeed reduces its flat
        # fp32 gradients as a whole and does not look at these.)
        "zero_optimization": {
            "stage": engine.stage,
            "reduce_bucket_size": 20_000_000,
            "allgather_bucket_size": 200_000_000,
        },
    }
    if engine.precision is Precision.bf16:
        config |= {
            "bf16": {"enabled": True},
            # At stage 0 gradients are bf16 from the backward to the step, and DeepSpeed takes nothing else.
            "data_types": {"grad_accum_dtype": "fp32" if engine.stage else "bf16"},
            "communication_data_type": "fp32",
        }
    return config
