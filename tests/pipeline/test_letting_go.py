"""What an engine does with layers that freeze, at every ZeRO stage and under FSDP2: against a plain loop."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from pipeline.compression import Compression
from pipeline.methods import DINOConfig, LocalMIMConfig, Method, MoCoConfig, SimCLRConfig, build_method
from pipeline.models.vit import ViT, ViTConfig
from pipeline.schedules import StepPlan

LOCALMIM = LocalMIMConfig(taps=[1, 2, 3], doublings=[1, 0, -1], decoder_dim=32, decoder_heads=2)
CONFIGS = {
    "moco": MoCoConfig(hidden_dim=64, out_dim=32),
    "simclr": SimCLRConfig(hidden_dim=64, out_dim=32),
    "dino": DINOConfig(out_dim=24, hidden_dim=40, bottleneck_dim=16, small_crops=1, small_size=16),
    "localmim": LOCALMIM,
}


@dataclass(frozen=True)
class Crops:
    views: tuple[torch.Tensor, ...]
    index: torch.Tensor


# Two layers freeze after eight of twenty steps, a third after fourteen. `Plain` is the reference: fp32 masters,
# gradients averaged by hand, what is frozen taken out of AdamW, its state with it.
SCRIPT = """
    import os
    import sys
    from dataclasses import dataclass
    from pathlib import Path
    import torch
    import torch.distributed as dist
    from pipeline import distributed, engine as deepspeed_engine, optim
    from pipeline.engine_config import FSDP2, EngineConfig, Precision
    from pipeline.engines import build_engine
    from pipeline.methods import LocalMIMConfig, MoCoConfig, build_method
    from pipeline.methods.localmim import DecoderRates
    from pipeline.models.vit import ViT, ViTConfig
    from pipeline.optim import OptimConfig, parameter_groups
    from pipeline.pieces import Reader
    from pipeline.schedules import StepPlan
    from pipeline.shards import local, place_of_shard

    def adamw(*args, **kwargs):
        # In one pass over the memory the last few elements of a tensor round otherwise, and ZeRO's tensors end
        # elsewhere: what is carried over is compared to the bit in passes of one operation each.
        optimizer = optim.adamw(*args, **kwargs)
        for group in optimizer.param_groups:
            group["fused"] = False
        return optimizer

    deepspeed_engine.adamw = adamw
    world = distributed.start()
    METHOD, STAGE, PRECISION = "{method}", {stage!r}, Precision("{precision}")
    # Whether each process has a part of the weights only.
    CUT = STAGE in (3, "fsdp2")
    DTYPE = torch.bfloat16 if PRECISION is Precision.bf16 else torch.float32
    OPTIM = OptimConfig(clip={clip}, decay_vectors=False)
    CONFIG = (
        MoCoConfig(hidden_dim=64, out_dim=32)
        if METHOD == "moco"
        else LocalMIMConfig(
            taps=[1, 2, 3], doublings=[1, 0, -1], decoder_dim=32, decoder_heads=2,
            decoder_rates=DecoderRates("{decoder_rates}"),
        )
    )

    def frozen_at(step):
        return 0 if step < 8 else 2 if step < 14 else 3

    def plan(step):
        rates = tuple(0.0 if i < frozen_at(step) else 1e-3 * (i + 1) for i in range(4))
        return StepPlan(step / 40, 2e-3, 0.1, 0.9, rates)

    @dataclass(frozen=True)
    class Batch:
        views: tuple
        index: torch.Tensor

    def batch(step):
        generator = torch.Generator().manual_seed(2 * step + world.rank)
        count = 2 if METHOD == "moco" else 1
        views = tuple(torch.randn(8, 3, 32, 32, generator=generator).to(DTYPE) for _ in range(count))
        return Batch(views, torch.arange(8) + 8 * (2 * step + world.rank))

    def make_method():
        torch.manual_seed(0)
        vit = ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 3, 3, reference_length=17)
        return build_method(CONFIG, ViT(vit, seed=0))

    def make_engine():
        config = FSDP2(PRECISION) if STAGE == "fsdp2" else EngineConfig(PRECISION, STAGE)
        return build_engine(make_method(), config, OPTIM, local_batch=8, device=world.device)

    class Plain:
        def __init__(self):
            self.method = make_method()
            self.masters = {{
                # DeepSpeed's masters start from weights that are rounded already.
                p: p.detach().to(DTYPE).float().clone().requires_grad_()
                for p in self.method.parameters() if p.requires_grad
            }}
            self.method.to(DTYPE)
            self.method.prepare(world.device, DTYPE)
            method = self.method
            groups = parameter_groups(
                method.layers(), method.parameters(), (), method.attached(), decay_vectors=False
            )
            for group in groups:
                group["params"] = [self.masters[p] for p in group["params"]]
            self.optimizer = adamw(groups, OPTIM)

        def step(self, batch, plan):
            gone = [f"{{kind}}{{i:02d}}" for i in range(plan.frozen_layers) for kind in ("layer", "attached")]
            kept = []
            for group in self.optimizer.param_groups:
                name = group["name"].removesuffix("_vectors")
                if name in gone:
                    for master in group["params"]:
                        self.optimizer.state.pop(master, None)
                    continue
                kept.append(group)
                group["lr"] = plan.layer_rates[int(name[5:])] if name.startswith("layer") else plan.learning_rate
                group["weight_decay"] = plan.weight_decay if name == group["name"] else 0.0
            self.optimizer.param_groups[:] = kept
            for parameter in self.masters:
                parameter.grad = None
            output = self.method(batch, plan)
            output.loss.backward()
            live = {{id(m) for group in kept for m in group["params"]}}
            for parameter, master in self.masters.items():
                master.grad = None
                if id(master) in live and parameter.grad is not None:
                    master.grad = distributed.mean_over_ranks(parameter.grad.float())
            if OPTIM.clip:
                torch.nn.utils.clip_grad_norm_([m for m in self.masters.values() if m.grad is not None], OPTIM.clip)
            self.optimizer.step()
            with torch.no_grad():
                for parameter, master in self.masters.items():
                    if id(master) in live:
                        parameter.copy_(master)
            self.method.after_step(plan, output)
            return output

    sent = 0
    def count_sent(name):
        original = getattr(dist, name)
        def counting(*args, **kwargs):
            global sent
            sent += sum(a.numel() * a.element_size() for a in args[:1] if torch.is_tensor(a))
            return original(*args, **kwargs)
        setattr(dist, name, counting)
    for name in ("all_reduce", "reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather"):
        count_sent(name)

    def kept_bytes(engine):
        optimizer = engine._optimizer
        inner = getattr(optimizer, "optimizer", optimizer)
        return sum(
            t.numel() * t.element_size()
            for state in inner.state.values() for t in state.values() if torch.is_tensor(t)
        )

    def count(p):
        return getattr(p, "ds_numel", p.numel())

    def share_live(method, frozen):
        gone = [p for i in range(frozen) for p in method.layers()[i] + method.attached().get(i, [])]
        return 1 - sum(count(p) for p in gone if id(p) in ids) / sum(count(p) for p in learning)

    def mine(p):
        # What pads a shard is nobody's.
        return local(p).reshape(-1)[: place_of_shard(p, world.rank)[1]]

    def weights(engine):
        if not CUT:
            return dict(engine.method.named_parameters())
        engine.save(scratch / "now")
        dist.barrier()
        reader = Reader(scratch / "now")
        names = [name for name, _ in engine.method.named_parameters()]
        return {{n: reader.whole(("weight/" if f"weight/{{n}}" in reader.names else "master/") + n) for n in names}}

    engine, plain = make_engine(), Plain()
    learning = [p for p in engine.method.parameters() if p.requires_grad]
    ids = {{id(p) for p in learning}}
    names = {{id(p): n for n, p in engine.method.named_parameters()}}
    keys = list(engine.method.state_dict())
    scratch = Path(sys.argv[0]).parent / "saved"
    traffic, memory, still = [], [], {{}}
    for step in range(20):
        now = plan(step)
        before = sent
        result = engine.step(batch(step), now)
        traffic.append(sent - before)
        memory.append(kept_bytes(engine))
        expected = plain.step(batch(step), now).loss.detach()
        error = abs(float(result.loss) - float(expected))
        assert error <= {loss_tolerance}, (step, float(result.loss), float(expected))
        gone = [p for i in range(now.frozen_layers) for p in engine.method.layers()[i]]
        gone += [p for i in range(now.frozen_layers) for p in engine.method.attached().get(i, [])]
        assert all(p.grad is None and not p.requires_grad for p in gone)
        for p in gone:
            still.setdefault(id(p), local(p).clone())
            assert torch.equal(still[id(p)], local(p)), names[id(p)]
        if step in (7, 11):
            engine.save(scratch / f"step{{step}}")
    for (name, ours), theirs in zip(weights(engine).items(), plain.method.parameters(), strict=True):
        if not {tolerance} or not name.endswith(("qkv.bias", "encoder.norm.bias")):
            ours = ours.to(DTYPE)
            torch.testing.assert_close(ours, theirs, atol={tolerance}, rtol=0, msg=lambda m: f"{{name}}: {{m}}")
    # What is pruned keeps its name, and its place in a checkpoint.
    assert list(engine.method.state_dict()) == keys
    for k, first in ((2, 9), (3, 15)):
        share = share_live(engine.method, k)
        assert memory[first] < (share + 0.03) * memory[1], (memory, share)
        # Where weights are cut a forward needs what is frozen, too, from all processes.
        if world.size > 1 and not CUT:
            extra = 3000  # norms, losses, batch statistics
            assert traffic[first] < share * traffic[1] + extra, (traffic, share)
    for saved in (7, 11):  # before and after the first event
        again = make_engine()
        for p in again.method.parameters():
            local(p).add_(1.0)
        again.load(scratch / f"step{{saved}}")
        for step in range(saved + 1, 20):
            again.step(batch(step), plan(step))
        for (name, one), other in zip(engine.method.named_parameters(), again.method.parameters(), strict=True):
            assert torch.equal(mine(one), mine(other)), (saved, name)
        for key, value in engine.method.state().items():
            assert torch.equal(value, again.method.state()[key]), (saved, key)
    print("same")
    dist.barrier()
    sys.stdout.flush()
    # ZeRO 3 over gloo aborts now and then when the interpreter ends.
    os._exit(0)
    """
EXACT = {"tolerance": 0.0, "loss_tolerance": 0.0}
# DeepSpeed clips by a number that is rounded elsewhere. Around its modules at stage 3 gradients of a tap may come
# in another order, in which three numbers add up to another one.
ROUNDED = {"tolerance": 3e-5, "loss_tolerance": 2e-5}
# Stage 0 averages gradients in bf16; and what is rounded anew Adam turns into steps.
ROUNDED_BF16 = {"tolerance": 2e-2, "loss_tolerance": 2e-2}


@pytest.mark.parametrize(
    ("method", "stage", "precision", "ranks", "clip", "decoder_rates", "tolerances"),
    [
        ("localmim", 0, "fp32", 1, 0.0, "tapped", EXACT),
        ("localmim", 0, "bf16", 1, 0.0, "tapped", EXACT),
        ("localmim", 0, "bf16", 2, 0.5, "tapped", ROUNDED_BF16),
        ("localmim", 1, "fp32", 2, 0.5, "shared", ROUNDED),
        ("localmim", 1, "bf16", 2, 0.0, "shared", EXACT),
        ("localmim", 2, "fp32", 2, 0.0, "tapped", EXACT),
        ("localmim", 2, "bf16", 1, 0.0, "shared", EXACT),
        ("localmim", 3, "fp32", 2, 0.5, "tapped", ROUNDED),
        ("localmim", 3, "bf16", 2, 0.0, "tapped", ROUNDED_BF16),
        ("moco", 0, "fp32", 2, 0.0, "tapped", EXACT),
        ("moco", 1, "fp32", 2, 0.0, "tapped", EXACT),
        ("moco", 1, "bf16", 1, 0.0, "tapped", EXACT),
        ("moco", 2, "fp32", 2, 0.0, "tapped", EXACT),
        ("moco", 2, "bf16", 2, 0.0, "tapped", EXACT),
        ("moco", 3, "fp32", 1, 0.0, "tapped", EXACT),
        ("moco", 3, "bf16", 2, 0.0, "tapped", EXACT),
        ("localmim", "fsdp2", "fp32", 2, 0.5, "shared", ROUNDED),
        ("moco", "fsdp2", "bf16", 1, 0.0, "tapped", ROUNDED_BF16),
    ],
)
def test_frozen_layers_are_let_go(
    run_ranks: Callable[..., list[str]],
    method: str,
    stage: int,
    precision: str,
    ranks: int,
    clip: float,
    decoder_rates: str,
    tolerances: dict[str, float],
) -> None:
    script = SCRIPT.format(
        method=method, stage=stage, precision=precision, decoder_rates=decoder_rates, clip=clip, **tolerances
    )
    assert [said.strip().splitlines()[-1] for said in run_ranks(script, ranks)] == ["same"] * ranks


def make_method(name: str) -> Method:
    torch.manual_seed(0)
    return build_method(CONFIGS[name], ViT(ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 3, 3), seed=0))


def make_crops(method: Method) -> Crops:
    return Crops(tuple(torch.randn(8, 3, spec.size, spec.size) for spec in method.views()), torch.arange(8))


def nodes(loss: torch.Tensor) -> Iterator[object]:
    """Yield every node of the graph behind a loss."""
    seen, queue = set(), [loss.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            queue += [parent for parent, _ in node.next_functions]
            yield node


@pytest.mark.parametrize("name", list(CONFIGS))
def test_no_backward_goes_through_frozen_layers(name: str, make_plan: Callable[..., StepPlan]) -> None:
    method = make_method(name)
    outputs: dict[int, list[torch.Tensor]] = {}
    for number, block in enumerate(method.encoder.blocks, start=1):
        block.register_forward_hook(lambda _, __, out, i=number: outputs.setdefault(i, []).append(out))
    counts = []
    for frozen in range(4):
        outputs.clear()
        for i in range(frozen):
            for p in method.layers()[i]:
                p.requires_grad_(False)
        loss = method(make_crops(method), make_plan(method, Compression(), frozen)).loss
        for number, found in outputs.items():
            assert all((out.grad_fn is None) == (number < frozen) for out in found)
        reached = {id(node.variable) for node in nodes(loss) if hasattr(node, "variable")}  # type: ignore[attr-defined]
        assert not reached & {id(p) for layer in method.layers()[:frozen] for p in layer}
        counts.append(sum(1 for _ in nodes(loss)))
    assert counts == sorted(counts, reverse=True)
    # Two blocks have gone, and each had as many nodes as the other; LocalMIM's decoders differ.
    if name != "localmim":
        assert counts[1] - counts[2] == counts[2] - counts[3] > 10
