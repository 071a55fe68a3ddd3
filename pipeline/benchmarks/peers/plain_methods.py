"""MoCo-v3, SimCLR and DINO as their training scripts go about them, with the weights of our own methods.

A forward for each view (DINO: for each size of crops), every token of every image, the whole network in every backward,
and momentum networks that follow parameter by parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import groupby
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.benchmarks.peers.plain_networks import PlainPrototypeHead, PlainViT, plain_head
from pipeline.methods.base import Method
from pipeline.methods.dino import DINO, LARGE, DINOConfig
from pipeline.methods.moco import MoCo
from pipeline.methods.simclr import SimCLR
from pipeline.schedules import StepPlan


class PlainMethod(nn.Module):
    """An objective; of the plan it takes numbers only: momentum and temperature."""

    def forward(self, views: Sequence[Tensor], plan: StepPlan) -> Tensor:
        """Return the loss of a batch."""
        raise NotImplementedError

    def after_step(self, plan: StepPlan) -> None:
        """Do what follows an optimizer step."""

    def last_layer(self) -> list[nn.Parameter]:
        """Return the parameters that may wait at the start of a run."""
        return []

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Move the momentum networks."""


class PlainMoCo(PlainMethod):
    """The momentum networks move between the two forwards."""

    def __init__(self, ours: MoCo) -> None:
        super().__init__()
        self.temperature = ours.config.temperature
        self.pairs = [(0, 1), (1, 0)] if ours.config.symmetric else [(0, 1)]
        self.online = nn.Sequential(PlainViT(ours.encoder), plain_head(ours.projector))
        self.predictor = plain_head(ours.predictor)
        self.momentum = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, views: Sequence[Tensor], plan: StepPlan) -> Tensor:
        queries = [self.predictor(self.online(views[query])) for query, _ in self.pairs]
        with torch.no_grad():
            self.follow(plan.momentum)
            keys = [self.momentum(views[key]) for _, key in self.pairs]
        return torch.stack([self._contrast(*pair) for pair in zip(queries, keys, strict=True)]).sum()

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        _follow(self.momentum, self.online, momentum)

    def _contrast(self, query: Tensor, key: Tensor) -> Tensor:
        query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
        logits = torch.mm(query, key.t()) / self.temperature
        return F.cross_entropy(logits, torch.arange(len(query), device=query.device)) * (2 * self.temperature)


class PlainSimCLR(PlainMethod):
    """Both views in one matrix of similarities."""

    def __init__(self, ours: SimCLR) -> None:
        super().__init__()
        self.temperature, self.symmetric = ours.config.temperature, ours.config.symmetric
        self.online = nn.Sequential(PlainViT(ours.encoder), plain_head(ours.projector))

    def forward(self, views: Sequence[Tensor], plan: StepPlan) -> Tensor:
        outputs = F.normalize(torch.cat([self.online(view) for view in views]), dim=1)
        similarities = torch.mm(outputs, outputs.t()) / self.temperature
        similarities = similarities.masked_fill(
            torch.eye(len(outputs), dtype=torch.bool, device=outputs.device), float("-inf")
        )
        # Of each row the other view of its image.
        targets = torch.arange(len(outputs), device=outputs.device).roll(len(views[0]))
        anchors = len(outputs) if self.symmetric else len(views[0])
        return F.cross_entropy(similarities[:anchors], targets[:anchors])


class PlainDINO(PlainMethod):
    """Crops of one size go through the student together, as its script has it."""

    center: Tensor

    def __init__(self, ours: DINO) -> None:
        super().__init__()
        self.config: DINOConfig = ours.config
        self.queries = LARGE if self.config.symmetric else LARGE[:1]
        self.keys = LARGE if self.config.symmetric else LARGE[1:]
        self.student = nn.ModuleList([PlainViT(ours.encoder), PlainPrototypeHead(ours.head)])
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        if ours.encoder.config.stochastic_depth:
            cast(PlainViT, self.student[0]).skip_branches(ours.encoder.config.stochastic_depth)
        self.register_buffer("center", torch.zeros(1, self.config.out_dim))

    def forward(self, views: Sequence[Tensor], plan: StepPlan) -> Tensor:
        with torch.no_grad():
            taught = self._outputs(self.teacher, [views[key] for key in self.keys])
            targets = F.softmax((taught.float() - self.center) / plan.teacher_temperature, dim=1).chunk(len(self.keys))
        crops = [*self.queries, *range(len(LARGE), len(views))]
        learned = self._outputs(self.student, [views[crop] for crop in crops]).float() / self.config.student_temperature
        losses = [
            -(target * F.log_softmax(student, dim=1)).sum(1).mean()
            for key, target in zip(self.keys, targets, strict=True)
            for crop, student in zip(crops, learned.chunk(len(crops)), strict=True)
            if crop != key
        ]
        self._move_center(taught.float())
        return torch.stack(losses).mean()

    def after_step(self, plan: StepPlan) -> None:
        self.follow(plan.momentum)

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        _follow(self.teacher, self.student, momentum)

    def last_layer(self) -> list[nn.Parameter]:
        return list(cast(PlainPrototypeHead, self.student[1]).last.parameters())

    @staticmethod
    def _outputs(networks: nn.ModuleList, crops: Sequence[Tensor]) -> Tensor:
        backbone, head = networks
        sizes = groupby(crops, key=lambda crop: crop.shape[-1])
        outputs: Tensor = head(torch.cat([backbone(torch.cat(list(group))) for _, group in sizes]))
        return outputs

    @torch.no_grad()
    def _move_center(self, taught: Tensor) -> None:
        momentum = self.config.center_momentum
        self.center = self.center * momentum + taught.mean(dim=0, keepdim=True) * (1 - momentum)


def _follow(momentum_network: nn.Module, online: nn.Module, momentum: float) -> None:
    for average, parameter in zip(momentum_network.parameters(), online.parameters(), strict=True):
        average.data.mul_(momentum).add_(parameter.detach().data, alpha=1 - momentum)


PLAIN: dict[type[Method], type[PlainMethod]] = {MoCo: PlainMoCo, SimCLR: PlainSimCLR, DINO: PlainDINO}
