"""The FSDP2 door: the steps of DeepSpeed's engine, with PyTorch's own sharding and optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from pipeline import accumulation, optimizer_state
from pipeline.engine_config import EngineConfig, Precision
from pipeline.gradients import TensorNorms
from pipeline.heartbeat import Heartbeat, Phase
from pipeline.methods.base import Batch, Method, StepOutput
from pipeline.models.blocks import EagerBlocks, run_block
from pipeline.models.vit import ViT
from pipeline.optim import OptimConfig
from pipeline.schedules import StepPlan
from pipeline.shard_optimizer import ShardOptimizer
from pipeline.shards import is_cut, local
from pipeline.training_engine import TrainingEngine, nan_gradient_unless_finite


class FSDPEngine(TrainingEngine):
    """Trains a method under FSDP2: weights, gradients and optimizer are cut, block by block, and the rest at once."""

    def __init__(
        self, method: Method, config: EngineConfig, optim: OptimConfig, *, local_batch: int, device: torch.device
    ) -> None:
        super().__init__(method, config, optim, local_batch=local_batch, device=device)
        # The average is what is cut; in bf16 it is gathered as such.
        method.prepare(device, torch.float32)
        self._root = _shard(self._exposed, device, self._policy)
        self._followers = [_shard(each.root, device, self._policy) for each in method.momentum_encoders()]
        for follower in method.momentum_encoders():
            follower.shard(dist.get_rank(), self._policy.param_dtype)
        # Not before: FSDP2 has put parameters of its own in the place of those that were there.
        self._find_parameters()
        self._shards = ShardOptimizer(self._groups(), optim)
        self._norms = TensorNorms(self._shards)
        # As DeepSpeed's masters start.
        self._round(method.parameters())

    def optimizer_bytes(self) -> int:
        """Return the size of the master weights, which are the weights, and moments that this process keeps."""
        return optimizer_state.num_bytes(self)

    @property
    def optimizer(self) -> ShardOptimizer:
        """Return the optimizer, where `optimizer_state` looks for it in an engine."""
        return self._shards

    @property
    def _optimizer(self) -> ShardOptimizer:
        return self._shards

    @property
    def _policy(self) -> MixedPrecisionPolicy:
        # Methods cast what they must; images stay as they come, since targets are made of them.
        if self._config.precision is Precision.fp32:
            return MixedPrecisionPolicy(cast_forward_inputs=False)
        return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)

    def _add_gradients(self, batch: Batch, plan: StepPlan, heartbeat: Heartbeat) -> StepOutput:
        outputs: list[StepOutput] = []
        parts = accumulation.parts(batch, self._config.micro_batch)
        for number, part in enumerate(parts, start=1):
            self._root.set_requires_gradient_sync(number == len(parts))
            self._root.set_is_last_backward(number == len(parts))
            heartbeat.enter(Phase.forward)
            outputs.append(StepOutput(*self._exposed(part, plan)))
            heartbeat.enter(Phase.backward)
            loss: Any = nan_gradient_unless_finite(outputs[-1].loss) / len(parts)
            loss.backward()
        return accumulation.mean(outputs)

    def _update(self) -> bool:
        self._norms.measure()
        if self._optim.clip_each:
            self._norms.clip(self._optim.clip_each)
        if self._optim.clip:
            self._norms.clip_total(self._optim.clip)
        finite = math.isfinite(self._norms.total())
        if finite:
            self._shards.step()
        for parameter in self._shards.parameters:
            parameter.grad = None
        self._forget_forwards()
        return finite

    def _forget_forwards(self) -> None:
        """Reset what never has a backward, and would note every forward of the run."""
        for follower, root in zip(self.method.momentum_encoders(), self._followers, strict=True):
            if follower.ran:
                root.reset_iter_state()
            follower.ran = False

    def _let_go(self) -> None:
        self._shards.keep(self._live_names())
        self._norms = TensorNorms(self._shards)
        self._round(self._gone(self._frozen_layers))

    @torch.no_grad()
    def _round(self, parameters: Iterable[Tensor]) -> None:
        """Make of weights what forwards take them for, which is what DeepSpeed keeps of those that do not learn."""
        if self._config.precision is Precision.bf16:
            for parameter in parameters:
                local(parameter).copy_(local(parameter).bfloat16())


class _GatheredBlocks(EagerBlocks):
    """Runs blocks so that FSDP2 notices, also where their branches are scaled outside their own forward."""

    def __call__(self, block: nn.Module, tokens: Tensor, scales: Tensor | None) -> Tensor:
        run: Any = block if scales is None else block.run_scaled
        output: Tensor = run(tokens) if scales is None else run(tokens, scales)
        return output


class _OnItsOwn:
    """Gathers what a backbone uses outside its blocks, where a probe calls it without the root."""

    def __init__(self, vit: ViT, root: FSDPModule) -> None:
        self._root = root
        self._gathered = False
        vit.register_forward_pre_hook(self._gather)
        vit.register_forward_hook(self._let_go, always_call=True)

    def _gather(self, vit: ViT, inputs: Any) -> None:
        self._gathered = is_cut(vit.class_token)
        if self._gathered:
            self._root.unshard()

    def _let_go(self, vit: ViT, inputs: Any, output: Any) -> None:
        if self._gathered:
            self._root.reshard()
        self._gathered = False


def _shard(root: nn.Module, device: torch.device, policy: MixedPrecisionPolicy) -> FSDPModule:
    """Cut every block of every backbone on its own and all else, embeddings and heads, with the root."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    backbones = [module for module in root.modules() if isinstance(module, ViT)]
    for vit in backbones:
        for block in vit.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
            block.run_scaled = MethodType(run_block, block)
            register_fsdp_forward_method(block, "run_scaled")
        vit.run_block = _GatheredBlocks()
    # Said outright, it holds for the root, too: that of a momentum encoder, which has no backward, would stay gathered,
    # and hide what is written to its shards.
    learns = any(parameter.requires_grad for parameter in root.parameters())
    sharded: FSDPModule = fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=not learns)
    for vit in backbones:
        _OnItsOwn(vit, sharded)
    return sharded
