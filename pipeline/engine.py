"""The DeepSpeed door: gradients, clipping and updates under ZeRO, and optimizers rebuilt when layers freeze."""

from __future__ import annotations

import logging
import math
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from pipeline import accumulation, optimizer_state
from pipeline.engine_config import SHARDED, EngineConfig, Offload, Precision, deepspeed_options, merged
from pipeline.gradients import TensorNorms
from pipeline.heartbeat import Heartbeat, Phase
from pipeline.methods.base import Batch, Method, StepOutput
from pipeline.models.vit import ViT
from pipeline.optim import OptimConfig, adamw
from pipeline.schedules import StepPlan
from pipeline.training_engine import TrainingEngine, nan_gradient_unless_finite

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"deepspeed|torch")

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402
import deepspeed.runtime.bf16_optimizer  # noqa: E402
import deepspeed.runtime.compiler  # noqa: E402

# What of DeepSpeed's own could be compiled here: nothing. Asked for, the table compiles test programs, whose commands
# land on the screen; and what it lists is compiled at the first start (up to 100 s), for inference only.
deepspeed.ops.__compatible_ops__ = {}
# Looking for Muon, it wraps what Muon would compile, which loads PyTorch's compiler: a second of every start.
deepspeed.runtime.compiler.compile = lambda: lambda function: function
# It prints pages on memory, collects garbage for them, and resets the peak that others measure.
deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


class Engine(TrainingEngine):
    """Trains a method under DeepSpeed's ZeRO."""

    def __init__(
        self,
        method: Method,
        config: EngineConfig,
        optim: OptimConfig,
        *,
        local_batch: int,
        device: torch.device,
    ) -> None:
        super().__init__(method, config, optim, local_batch=local_batch, device=device)
        self._find_parameters()
        self._start()
        dtype = torch.bfloat16 if config.precision is Precision.bf16 else torch.float32
        method.prepare(device, dtype)
        if config.stage == SHARDED:
            self._shard_followers()

    @property
    def _optimizer(self) -> Any:
        return self._engine.optimizer

    def _update(self) -> bool:
        self._measure_and_clip()
        finite = self._drop_unless_finite()
        self._engine.step()
        optimizer_state.forget_gradients(self._engine.optimizer)
        applied = finite and bool(self._engine.was_step_applied())
        if self._config.offload is Offload.parameters and torch.cuda.is_available():
            # A momentum encoder writes weights on the host, which gathers that are under way may still read.
            torch.cuda.synchronize()
        return applied

    def _add_gradients(self, batch: Batch, plan: StepPlan, heartbeat: Heartbeat) -> StepOutput:
        # DeepSpeed divides by the number of parts.
        outputs: list[StepOutput] = []
        for part in accumulation.parts(batch, self._config.micro_batch):
            if outputs:
                # For DeepSpeed every part is a step, of which all but the last do nothing.
                self._engine.step()
                heartbeat.enter(Phase.forward)
            outputs.append(StepOutput(*self._engine(part, plan)))
            heartbeat.enter(Phase.backward)
            self._engine.backward(nan_gradient_unless_finite(outputs[-1].loss))
        return accumulation.mean(outputs)

    def _let_go(self) -> None:
        kept = optimizer_state.take(self._engine, self._live_names())
        optimizer_state.retire(self._engine)
        del self._engine, self._norms
        self._start()
        optimizer_state.put(self._engine, kept)

    def optimizer_bytes(self) -> int:
        return optimizer_state.num_bytes(self._engine)

    def grad_norm(self) -> float:
        if self._optim.clip_each or self._plain:
            return self._norms.total()
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def save_as_deepspeed(self, directory: Path) -> None:
        """Write DeepSpeed's own checkpoint, which nothing here reads: what `save` is measured against."""
        self._engine.save_checkpoint(str(directory.parent), tag=directory.name, save_latest=False)

    def _start(self) -> None:
        """Let DeepSpeed take over what learns."""
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(
            model=self._exposed,
            optimizer=adamw(self._groups(), self._optim, on_host=self._config.offload is not Offload.none),
            config=self._options(),
            dist_init_required=False,
        )
        if self._config.stage == 0 and not self._plain:
            # It took a step without gradients, at a rate of zero, and counted it.
            self._engine.optimizer.optimizer.state.clear()
        if self._config.stage == SHARDED:
            _register_loose(self._exposed)
        self._norms = TensorNorms(self._engine.optimizer)

    def _shard_followers(self) -> None:
        """Cut the momentum encoders as the networks that they follow are cut."""
        # Gathers of their own stream would not wait for the update that is written on the usual one.
        options = merged(self._options(), {"zero_optimization": {"overlap_comm": False}})
        for follower in self.method.momentum_encoders():
            deepspeed.initialize(model=follower.root, config=options, dist_init_required=False)
            _register_loose(follower.root)
            follower.shard(dist.get_rank())

    def _options(self) -> dict[str, Any]:
        # DeepSpeed's own clipping at stage 0 in fp32 fails without a gradient.
        return deepspeed_options(self._config, self._local_batch, 0.0 if self._plain else self._optim.clip)

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


def _register_loose(root: nn.Module) -> None:
    """Let ZeRO 3 gather what is used outside the forward of the module that owns it: the embedding of a backbone."""
    for module in root.modules():
        for parameter in module.layers()[0] if isinstance(module, ViT) else ():
            deepspeed.zero.register_external_parameter(module, parameter)
            deepspeed.zero.register_external_parameter(root, parameter)
