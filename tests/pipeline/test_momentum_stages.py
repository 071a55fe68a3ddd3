"""The momentum encoder under every engine: an exponential average of the engine's own weights, never gathered."""

from collections.abc import Callable

import pytest

SCRIPT = """
    import os
    import sys
    from dataclasses import dataclass
    import torch
    import torch.distributed as dist
    from pipeline import distributed
    from pipeline.engine_config import FSDP2, EngineConfig, Precision
    from pipeline.engines import build_engine
    from pipeline.methods import MoCoConfig, build_method
    from pipeline.models.vit import ViT, ViTConfig
    from pipeline.optim import OptimConfig
    from pipeline.schedules import StepPlan
    from pipeline.shards import local, place_of_shard

    world = distributed.start()
    PRECISION = Precision("{precision}")
    DTYPE = torch.bfloat16 if PRECISION is Precision.bf16 else torch.float32

    @dataclass(frozen=True)
    class Batch:
        views: tuple
        index: torch.Tensor

    def batch(step):
        generator = torch.Generator().manual_seed(2 * step + world.rank)
        views = tuple(torch.randn(4, 3, 16, 16, generator=generator).to(DTYPE) for _ in range(2))
        return Batch(views, torch.arange(4) + 4 * (2 * step + world.rank))

    def weights(parameter):
        # As forwards have them.
        return local(parameter).to(DTYPE).double()

    def check(stage):
        torch.manual_seed(0)
        vit = ViT(ViTConfig("vit_tiny_patch16_224", 16, 8, 24, 2, 3, reference_length=5), seed=0)
        method = build_method(MoCoConfig(hidden_dim=32, out_dim=16), vit)
        config = FSDP2(PRECISION) if stage == "fsdp2" else EngineConfig(PRECISION, stage)
        engine = build_engine(method, config, OptimConfig(), local_batch=4, device=world.device)
        encoder, = method.momentum_encoders()
        online = dict(method.named_parameters())
        expected = {{name: method.state()[name].double().clone() for name in encoder.parameters}}
        for step in range(50):
            momentum = 0.9 + 0.001 * step
            engine.step(batch(step), StepPlan(step / 50, 1e-3, 0.1, momentum, (1e-3,) * 3))
            for name, average in expected.items():
                average.mul_(momentum).add_(weights(online[name]), alpha=1 - momentum)
        state = method.state()
        for name, average in expected.items():
            assert state[name].dtype == torch.float32
            # What pads a shard is nobody's, and may be anything.
            count = place_of_shard(online[name], world.rank)[1]
            ours, theirs = state[name].reshape(-1)[:count], average.reshape(-1)[:count]
            torch.testing.assert_close(ours.double(), theirs, atol=1e-6, rtol=1e-6)
            published = local(encoder.parameters[name]).reshape(-1)[:count]
            # FSDP2 casts what it gathers.
            assert torch.equal(published, ours.to(torch.float32 if stage == "fsdp2" else DTYPE))
        return sum(each.numel() for each in expected.values())

    sizes = [check(stage) for stage in (0, 1, 2, 3, "fsdp2")]
    assert sizes[0] == sizes[1] == sizes[2]
    # Of the average, too, each process has its part only, but for padding.
    for size in sizes[3:]:
        assert size < 0.51 * sizes[0] if world.size == 2 else size == sizes[0]
    dist.barrier()
    print("same")
    sys.stdout.flush()
    # ZeRO 3 over gloo aborts now and then when the interpreter ends.
    os._exit(0)
    """


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_is_the_average_of_the_engines_own_weights(run_ranks: Callable[..., list[str]], precision: str) -> None:
    assert [said.strip() for said in run_ranks(SCRIPT.format(precision=precision), 2)] == ["same"] * 2
