"""What the training loop takes steps with, and all of it that does not depend on how weights are kept."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline import accumulation, engine_state, pieces
from pipeline.engine_config import EngineConfig
from pipeline.gradients import TensorNorms
from pipeline.heartbeat import UNWATCHED, Heartbeat, Phase
from pipeline.methods.base import Batch, Method, StepOutput
from pipeline.optim import HEADS, LAST_LAYER, VECTORS, OptimConfig, attached_name, layer_name, parameter_groups
from pipeline.optimizer_state import inner_optimizer, masters
from pipeline.pieces import SUFFIX, Piece, Reader, shared_out
from pipeline.schedules import StepPlan

FROZEN = "frozen_layers"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """What one step leaves to look at; tensors are not synchronized with the host."""

    loss: Tensor
    metrics: dict[str, Tensor]
    applied: bool


class Exposed(nn.Module):
    """A method whose output ZeRO 3 and FSDP2 can see into: they must know when the backward begins."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, batch: Batch, plan: StepPlan) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Return loss, metrics and what is pending."""
        output = self.method(batch, plan)
        return output.loss, output.metrics, output.pending


class TrainingEngine(ABC):
    """Trains a method one plan at a time.

    All engines take the same steps up to rounding, and each goes on from what any other has saved.
    """

    _norms: TensorNorms

    def __init__(
        self, method: Method, config: EngineConfig, optim: OptimConfig, *, local_batch: int, device: torch.device
    ) -> None:
        accumulation.check(config.micro_batch, local_batch, method)
        self.method = method.to(device)
        self._config, self._optim, self._local_batch = config, optim, local_batch
        self._frozen_layers = 0
        self._exposed = Exposed(method)

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
        applied = self._update()
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
        self._let_go()
        seconds = time.perf_counter() - begin
        log.info(
            "frozen: %d of %d layers; the optimizer let go of them in %.2f s", frozen_layers, len(self._layers), seconds
        )

    @abstractmethod
    def optimizer_bytes(self) -> int:
        """Return the size of the master weights and moments that this process keeps."""

    def grad_norm(self) -> float:
        """Return the global gradient norm of the last step, before clipping."""
        return self._norms.total()

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
        every = engine_state.pieces(self.method, self._optimizer, dist.get_rank())
        return shared_out(every, dist.get_rank(), dist.get_world_size())

    def facts(self) -> dict[str, Any]:
        """Return what a checkpoint must say beside the tensors."""
        return {FROZEN: self._frozen_layers, engine_state.STEPS: engine_state.steps(self._optimizer)}

    def save(self, directory: Path) -> None:
        """Write this process's part of a checkpoint into a directory; every process must do so."""
        directory.mkdir(parents=True, exist_ok=True)
        pieces.write(directory / file_name(dist.get_rank()), self.state(), self.facts())

    def load(self, directory: Path) -> None:
        """Restore what any engine of any number of processes has saved; every process must call this.

        Raises:
            ValueError: the files are damaged or lack something.
        """
        reader = Reader(directory)
        # The optimizer that saved had no place for what was frozen.
        self.freeze(reader.facts[FROZEN])
        engine_state.load(self.method, self._optimizer, reader, dist.get_rank())
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    @property
    @abstractmethod
    def _optimizer(self) -> Any:
        """Return what `optimizer_state` finds the state of each parameter in."""

    @abstractmethod
    def _add_gradients(self, batch: Batch, plan: StepPlan, heartbeat: Heartbeat) -> StepOutput:
        """Run forward and backward on the batch, part by part."""

    @abstractmethod
    def _update(self) -> bool:
        """Clip, and step the optimizer unless a gradient is not finite; return whether it has stepped."""

    @abstractmethod
    def _let_go(self) -> None:
        """Free what was kept for layers that are frozen now."""

    def _find_parameters(self) -> None:
        """Note which parameters there are; an engine may have put others in their places."""
        self._layers, self._attached = self.method.layers(), self.method.attached()
        self._last_layer = [p for p in self.method.last_layer() if p.requires_grad]

    def _groups(self) -> list[dict[str, Any]]:
        return parameter_groups(
            self._layers,
            self.method.parameters(),
            self._last_layer,
            self._attached,
            decay_vectors=self._optim.decay_vectors,
            undecayed=self.method.undecayed(),
        )

    def _gone(self, frozen_layers: int) -> Iterator[nn.Parameter]:
        for i in range(frozen_layers):
            yield from self._layers[i]
            yield from self._attached.get(i, [])

    def _live_names(self) -> set[str]:
        gone = {name for i in range(self._frozen_layers) for name in (layer_name(i), attached_name(i))}
        names = {group["name"] for group in self._optimizer.param_groups}
        return {name for name in names if name.removesuffix(VECTORS) not in gone}

    def _set_rates(self, plan: StepPlan) -> None:
        rates = {layer_name(i): rate for i, rate in enumerate(plan.layer_rates)}
        rates |= {attached_name(i): plan.learning_rate for i in self._attached}
        rates |= {HEADS: plan.learning_rate, LAST_LAYER: plan.last_layer_rate}
        for group in self._optimizer.param_groups:
            name = group["name"].removesuffix(VECTORS)
            group["lr"] = rates[name]
            group["weight_decay"] = plan.weight_decay if name == group["name"] else 0.0

    def _forget_last_layers_steps(self) -> None:
        # A flat group counts steps of zero gradients too, and Adam's bias correction would then take its first
        # moments, which start at zero, for long averages: the first updates after the release would be several
        # times too large. What is saved has the zero as well, so a resume needs no memory of the release.
        inner = inner_optimizer(self._optimizer)
        for (name, _), master in masters(self._optimizer):
            if name.removesuffix(VECTORS) == LAST_LAYER and "step" in inner.state.get(master, {}):
                inner.state[master]["step"].zero_()


def file_name(rank: int) -> str:
    """Return the name of what one process writes into a checkpoint."""
    return f"rank_{rank:05d}{SUFFIX}"


def nan_gradient_unless_finite(loss: Tensor) -> Tensor:
    """Return the loss, with a gradient of nan if it is not finite.

    Gradients are averaged, so all processes come to know without a message or a wait of their own.
    """
    return loss * torch.ones_like(loss).where(loss.detach().isfinite(), torch.nan)
