"""A step as training scripts of the field take it: fp32 weights, autocast, AdamW by default, a loss read back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.benchmarks.peers.plain_methods import PLAIN
from pipeline.engine_config import Precision
from pipeline.heartbeat import UNWATCHED, Heartbeat, Phase
from pipeline.methods.base import Method
from pipeline.optim import OptimConfig
from pipeline.schedules import StepPlan


class PlainLoop:
    """Takes steps with networks of its own, which start from the weights of a method of ours."""

    def __init__(self, ours: Method, optim: OptimConfig, precision: Precision, device: torch.device) -> None:
        """Copy the weights of a method in fp32 that no engine has taken over."""
        self.method = PLAIN[type(ours)](ours).to(device)
        self._optim, self._device, self._precision = optim, device, precision
        self._parameters = [p for p in self.method.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._groups(), lr=0.0, betas=(optim.betas[0], optim.betas[1]))

    def step(self, views: Sequence[Tensor], plan: StepPlan, heartbeat: Heartbeat = UNWATCHED) -> float:
        """Take a step with the plan's rates, of which all layers have the same, and return the loss."""
        heartbeat.enter(Phase.forward)
        for group in self._optimizer.param_groups:
            group["lr"] = plan.learning_rate
            group["weight_decay"] = plan.weight_decay if group["decays"] else 0.0
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._precision is Precision.bf16):
            loss: Tensor = self.method(views, plan)
        heartbeat.enter(Phase.backward)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        heartbeat.enter(Phase.step)
        self._clip()
        if plan.last_layer_rate == 0.0:
            for parameter in self.method.last_layer():
                parameter.grad = None
        self._optimizer.step()
        self.method.after_step(plan)
        return loss.item()

    def _groups(self) -> list[dict[str, object]]:
        vectors = [p for p in self._parameters if p.dim() <= 1 and not self._optim.decay_vectors]
        others = [p for p in self._parameters if p.dim() > 1 or self._optim.decay_vectors]
        return [{"params": others, "decays": True}, {"params": vectors, "decays": False}]

    def _clip(self) -> None:
        if self._optim.clip:
            nn.utils.clip_grad_norm_(self._parameters, self._optim.clip)
        if self._optim.clip_each:
            for parameter in self._parameters:
                if parameter.grad is not None:
                    factor = self._optim.clip_each / (parameter.grad.norm() + 1e-6)
                    if factor < 1:
                        parameter.grad.mul_(factor)
