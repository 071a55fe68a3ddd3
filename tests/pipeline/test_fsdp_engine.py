"""FSDP2 beside DeepSpeed: the same steps, less traffic with every layer that freezes, backbones that probes call."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline import distributed
from pipeline.compose import load
from pipeline.engine import Engine
from pipeline.engine_config import FSDP2, EngineConfig, Precision
from pipeline.engines import build_engine
from pipeline.fsdp_engine import FSDPEngine
from pipeline.methods.moco import MoCo
from pipeline.optim import OptimConfig
from pipeline.schedules import StepPlan
from pipeline.training_engine import TrainingEngine

WORDS = ["run=x", "data.shards=y", "budget.value=1"]
# Both engines take twenty steps with everything on that a run can have; what they save is compared.
SCRIPT = """
    import os
    import sys
    from dataclasses import dataclass
    from pathlib import Path
    import torch
    import torch.distributed as dist
    from pipeline import distributed, engine_state
    from pipeline.compression import Compression
    from pipeline.engine_config import FSDP2, EngineConfig, Precision
    from pipeline.engines import build_engine
    from pipeline.methods import DINOConfig, LocalMIMConfig, build_method
    from pipeline.models.vit import ViT, ViTConfig
    from pipeline.optim import OptimConfig
    from pipeline.pieces import Reader
    from pipeline.schedules import StepPlan

    world = distributed.start()
    SCRATCH = Path("{scratch}")
    CONFIGS = dict(
        dino=DINOConfig(out_dim=24, hidden_dim=40, bottleneck_dim=16, small_crops=1, small_size=16),
        localmim=LocalMIMConfig(taps=[1, 2, 3], doublings=[1, 0, -1], decoder_dim=32, decoder_heads=2),
    )

    @dataclass(frozen=True)
    class Batch:
        views: tuple
        index: torch.Tensor
        labels: object = None

    def batch(method, step):
        generator = torch.Generator().manual_seed(2 * step + world.rank)
        views = tuple(torch.randn(4, 3, v.size, v.size, generator=generator) for v in method.views())
        return Batch(views, torch.arange(4) + 4 * (2 * step + world.rank))

    def plan(step):
        rates = tuple(0.0 if i < 2 and step >= 10 else 1e-3 * (i + 1) for i in range(4))
        last = 0.0 if step < 3 else 2e-3
        return StepPlan(step / 20, 2e-3, 0.1, 0.9, rates, last_layer_rate=last, teacher_temperature=0.07)

    def make(name):
        torch.manual_seed(0)
        vit = ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 3, 3, reference_length=17, stochastic_depth=0.3)
        return build_method(CONFIGS[name], ViT(vit, seed=0))

    sent = 0
    def count(name):
        original = getattr(dist, name)
        def counting(*args, **kwargs):
            global sent
            sent += sum(kwargs[name].numel() for name in ("input", "input_tensor") if name in kwargs)
            return original(*args, **kwargs)
        setattr(dist, name, counting)
    # The name in newer and older versions of PyTorch.
    count("reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor")

    def run(name, kind, config):
        global sent
        engine = build_engine(
            make(name), config, OptimConfig(clip=0.5, decay_vectors=False), local_batch=4, device=world.device
        )
        losses, traffic, bytes_kept = [], [], []
        for step in range(20):
            sent = 0
            result = engine.step(batch(engine.method, step), plan(step))
            assert result.applied
            losses.append(float(distributed.mean_over_ranks(result.loss)))
            traffic.append(sent)
            bytes_kept.append(engine.optimizer_bytes())
        engine.save(SCRATCH / name / kind)
        dist.barrier()
        return engine, losses, traffic, bytes_kept

    def saved(name, kind):
        reader = Reader(SCRATCH / name / kind)
        return reader.facts, {{n: reader.whole(n).float() for n in reader.names}}

    def check(name, precision, parts, loss_within, moved_within):
        _, losses, _, expected_bytes = run(name, "zero", EngineConfig(precision, 1, micro_batch=parts))
        engine, found, traffic, bytes_kept = run(name, "fsdp2", FSDP2(precision, micro_batch=parts))
        assert max(abs(a - b) / (abs(a) + 0.1) for a, b in zip(losses, found)) < loss_within, (losses, found)
        (facts, theirs), (own_facts, ours) = saved(name, "zero"), saved(name, "fsdp2")
        assert facts == own_facts and theirs.keys() == ours.keys()
        start = dict(make(name).named_parameters())
        for key, tensor in theirs.items():
            kind, _, parameter = key.partition("/")
            # What has no gradient but rounding, of which Adam makes whole steps.
            if kind in ("master", "weight") and not key.endswith(("qkv.bias", "encoder.norm.bias")):
                moved = (tensor - start[parameter].detach()).norm()
                assert (ours[key] - tensor).norm() <= moved_within * moved + 1e-6, (key, moved)
        # What is frozen is reduced no more, and kept by no optimizer.
        learning = sum(p.numel() for p in engine.method.parameters() if p.requires_grad)
        assert traffic[-1] < 0.75 * traffic[9], traffic
        # Parts add up before they are reduced.
        assert not parts or traffic[-1] < 1.05 * learning, (traffic, learning)
        assert abs(bytes_kept[-1] / expected_bytes[-1] - 1) < 0.02 and bytes_kept[-1] < 0.75 * bytes_kept[9]
        return engine

    def check_probe(engine):
        # Called on its own, as probes do, before and after: the same as whole networks that a checkpoint gives.
        whole = make("dino")
        engine_state.load_networks(whole, Reader(SCRATCH / "dino" / "fsdp2"))
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))
        view = images, Compression(), torch.arange(4)
        with torch.no_grad():
            torch.testing.assert_close(engine.method.encoder(*view), whole.encoder(*view), atol=1e-6, rtol=1e-5)
            features = engine.method.representation(*view)
            torch.testing.assert_close(features, whole.representation(*view), atol=1e-6, rtol=1e-5)
        assert engine.step(batch(engine.method, 20), plan(20)).applied
        # The teacher has moved, and is seen to: nothing of it has stayed gathered.
        with torch.no_grad():
            moved = engine.method.representation(*view)
        assert (moved - features).abs().max() > 1e-5
        for root in engine._followers:
            assert len(root._get_fsdp_state()._comm_ctx.post_forward_order) < 10

    check("localmim", Precision.fp32, 2, 1e-5, 1e-3)
    check("dino", Precision.bf16, 0, 3e-2, 0.3)
    check_probe(check("dino", Precision.fp32, 0, 1e-5, 1e-3))
    print("same")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)
    """


def test_twenty_steps_are_deepspeeds_and_backbones_can_be_called_on_their_own(
    run_ranks: Callable[..., list[str]], tmp_path: Path
) -> None:
    script = SCRIPT.format(scratch=tmp_path / "scratch")
    assert [said.strip().splitlines()[-1] for said in run_ranks(script, 2)] == ["same"] * 2


def engine_for(method: MoCo, config: EngineConfig) -> TrainingEngine:
    distributed.start()
    return build_engine(method, config, OptimConfig(), local_batch=8, device=torch.device("cpu"))


def test_the_config_chooses_the_engine(make_moco: Callable[..., MoCo]) -> None:
    assert type(engine_for(make_moco(), load("train", WORDS).engine)) is Engine
    assert type(engine_for(make_moco(), load("train", [*WORDS, "engine=fsdp2"]).engine)) is FSDPEngine


def test_a_frozen_prefix_is_computed_once(make_moco: Callable[..., MoCo], make_batch: Callable[..., object]) -> None:
    moco = make_moco(symmetric=True)
    engine = engine_for(moco, FSDP2(Precision.fp32))
    (target,) = moco.momentum_encoders()
    calls = []
    for block in target.network["encoder"].blocks:  # type: ignore[index]
        block.register_forward_pre_hook(lambda block, _: calls.append(block))
    counted = []
    for step, frozen in enumerate([0, 2, 2]):
        calls.clear()
        rates = (0.0,) * frozen + (1e-3,) * (4 - frozen)
        # At a momentum of 0 the gap to what is frozen closes at once.
        engine.step(make_batch(start=step * 8), StepPlan(step / 20, 1e-3, 0.1, 0.0, rates))
        counted.append(len(calls))
    assert counted == [3, 3, 2]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["engine.stage=2"], r"engine\.stage is ZeRO's and must be left out with engine=fsdp2, got 2; take"),
        (
            ["engine.deepspeed={wall_clock_breakdown: true}"],
            r"engine\.deepspeed must be empty with engine=fsdp2, ",
        ),
        (
            ["compression=adaptive", "budget.unit=cost"],
            r"compression=adaptive .* engine=fsdp2 leaves each",
        ),
        (
            ["engine.offload=optimizer"],
            r"engine\.offload must be none with engine=fsdp2, got optimizer; say engine=zero3",
        ),
        (["model.compile=true"], r"model\.compile must be false with engine=fsdp2, whose gathers break every graph"),
    ],
)
def test_what_it_does_not_do_is_refused(words: list[str], sentence: str) -> None:
    load("train", [*WORDS, *words, "engine=zero2"])
    with pytest.raises(ValueError, match=sentence):
        load("train", [*WORDS, *words, "engine=fsdp2"])
