"""The DeepSpeed door: one optimizer step under ZeRO, per-layer rates, frozen layers, clipping, state."""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline import accumulation, engine_state, optimizer_state, pieces
from pipeline.engine_config import SHARDED, EngineConfig, Offload, Precision, deepspeed_options, merged
from pipeline.gradients import TensorNorms
from pipeline.heartbeat import UNWATCHED, Heartbeat, Phase
from pipeline.methods.base import Batch, Method, StepOutput
from pipeline.models.vit import ViT
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
from pipeline.pieces import SUFFIX, Piece, Reader, shared_out
from pipeline.schedules import StepPlan

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"deepspeed|torch")

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402
import deepspeed.runtime.bf16_optimizer  # noqa: E402

# What of DeepSpeed's own could be compiled here: nothing. Asked for, the table compiles test programs, whose commands
# land on the screen; and what it lists is compiled at the first start (up to 100 s), for inference only.
deepspeed.ops.__compatible_ops__ = {}
# It prints pages on memory, collects garbage for them, and resets the peak that others measure.
deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None
logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

FROZEN = "frozen_layers"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """What one step leaves to look at; tensors are not synchronized with the host."""

    loss: Tensor
    metrics: dict[str, Tensor]
    applied: bool


class _Exposed(nn.Module):
    """A method whose output ZeRO 3 can see into: it must know when the backward begins."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, batch: Batch, plan: StepPlan) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Return loss, metrics and what is pending."""
        output = self.method(batch, plan)
        return output.loss, output.metrics, output.pending


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
        accumulation.check(config.micro_batch, local_batch, method)
        self.method = method.to(device)
        self._exposed = _Exposed(method)
        self._config, self._optim, self._local_batch = config, optim, local_batch
        self._layers, self._attached = method.layers(), method.attached()
        self._last_layer = [p for p in method.last_layer() if p.requires_grad]
        self._frozen_layers = 0
        self._start()
        dtype = torch.bfloat16 if config.precision is Precision.bf16 else torch.float32
        method.prepare(device, dtype)
        if config.stage == SHARDED:
            self._shard_followers()

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
        output = self._add_gradients(batch, plan, heartbeat)
        heartbeat.enter(Phase.step)
        self._measure_and_clip()
        finite = self._drop_unless_finite()
        self._engine.step()
        optimizer_state.forget_gradients(self._engine.optimizer)
        applied = finite and bool(self._engine.was_step_applied())
        if self._config.offload is Offload.parameters and torch.cuda.is_available():
            # A momentum encoder writes weights on the host, which gathers that are under way may still read.
            torch.cuda.synchronize()
        if applied:
            self.method.after_step(plan, output)
        if plan.last_layer_rate == 0.0:
            self._forget_last_layers_steps()
        return StepResult(output.loss.detach(), output.metrics, applied)

    def _add_gradients(self, batch: Batch, plan: StepPlan, heartbeat: Heartbeat) -> StepOutput:
        """Run forward and backward on the batch, part by part; DeepSpeed divides by their number."""
        outputs: list[StepOutput] = []
        for part in accumulation.parts(batch, self._config.micro_batch):
            if outputs:
                # For DeepSpeed every part is a step, of which all but the last do nothing.
                self._engine.step()
                heartbeat.enter(Phase.forward)
            outputs.append(StepOutput(*self._engine(part, plan)))
            heartbeat.enter(Phase.backward)
            self._engine.backward(_nan_gradient_unless_finite(outputs[-1].loss))
        return accumulation.mean(outputs)

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

    def state(self) -> list[Piece]:
        """Return this process's part of all that a checkpoint must hold; the next step changes it."""
        every = engine_state.pieces(self.method, self._engine.optimizer, dist.get_rank())
        return shared_out(every, dist.get_rank(), dist.get_world_size())

    def facts(self) -> dict[str, Any]:
        """Return what a checkpoint must say beside the tensors."""
        return {FROZEN: self._frozen_layers, engine_state.STEPS: engine_state.steps(self._engine.optimizer)}

    def save(self, directory: Path) -> None:
        """Write this process's part of a checkpoint into a directory; every process must do so."""
        directory.mkdir(parents=True, exist_ok=True)
        pieces.write(directory / file_name(dist.get_rank()), self.state(), self.facts())

    def save_as_deepspeed(self, directory: Path) -> None:
        """Write DeepSpeed's own checkpoint, which nothing here reads: what `save` is measured against."""
        self._engine.save_checkpoint(str(directory.parent), tag=directory.name, save_latest=False)

    def load(self, directory: Path) -> None:
        """Restore what engines of any number of processes and any stage have saved; every process must call this.

        Raises:
            ValueError: the files are damaged or lack something.
        """
        reader = Reader(directory)
        # The optimizer that saved had no place for what was frozen.
        self.freeze(reader.facts[FROZEN])
        engine_state.load(self.method, self._engine.optimizer, reader, dist.get_rank())
        if torch.cuda.is_available():
            torch.cuda.synchronize()

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
            model=self._exposed,
            optimizer=adamw(groups, self._optim, on_host=self._config.offload is not Offload.none),
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
        inner = optimizer_state.inner_optimizer(self._engine.optimizer)
        for (name, _), master in optimizer_state.masters(self._engine.optimizer):
            if name.removesuffix(VECTORS) == LAST_LAYER and "step" in inner.state.get(master, {}):
                inner.state[master]["step"].zero_()


def file_name(rank: int) -> str:
    """Return the name of what one process writes into a checkpoint."""
    return f"rank_{rank:05d}{SUFFIX}"


def _register_loose(root: nn.Module) -> None:
    """Let ZeRO 3 gather what is used outside the forward of the module that owns it: the embedding of a backbone."""
    for module in root.modules():
        for parameter in module.layers()[0] if isinstance(module, ViT) else ():
            deepspeed.zero.register_external_parameter(module, parameter)
            deepspeed.zero.register_external_parameter(root, parameter)


def _nan_gradient_unless_finite(loss: Tensor) -> Tensor:
    """Return the loss, with a gradient of nan if it is not finite.

    Gradients are averaged, so all processes come to know without a message or a wait of their own.
    """
    return loss * torch.ones_like(loss).where(loss.detach().isfinite(), torch.nan)
