"""One process and two have the same loss and the same mean gradient, method by method."""

from pathlib import Path

import pytest
import torch

CODE = """
import torch
from pipeline.compression.schedule import compression
from pipeline.distributed import rank, start, world_size
from pipeline.methods import DINOConfig, FineTuneDeiTConfig, MoCoConfig, SimCLRConfig, build_method
from pipeline.models.vit import ViT, ViTConfig
from pipeline.schedules import StepPlan

class Crops:
    def __init__(self, views, index):
        self.views, self.index, self.labels = views, index, index % 5

start()
torch.manual_seed(0)
dino = DINOConfig(out_dim=24, hidden_dim=40, bottleneck_dim=16, small_crops=2, small_size=16)
moco, simclr = MoCoConfig(hidden_dim=64, out_dim=32, symmetric=True), SimCLRConfig(hidden_dim=64, out_dim=32)
finetune = FineTuneDeiTConfig(classes=5, average=0.9)
config = {"moco": moco, "simclr": simclr, "dino": dino, "finetune": finetune}[METHOD]
method = build_method(config, ViT(ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 3, 3), seed=0)).double()
method.prepare(torch.device("cpu"), torch.float64)
views = tuple(torch.randn(8, 3, v.size, v.size, dtype=torch.float64) for v in method.views())
mine = slice(rank(), None, world_size())
query = compression(16, 0.5)
plan = StepPlan(0.5, 1e-3, 0.1, 0.99, (1e-3,) * 4, query, method.key_compression(query), 1e-3, 0.07)
output = method(Crops(tuple(v[mine] for v in views), torch.arange(8)[mine]), plan)
output.loss.backward()
grads = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
loss = output.loss.detach().clone()
if world_size() > 1:
    for tensor in (loss, *grads.values()):
        torch.distributed.all_reduce(tensor)
        tensor /= world_size()
method.after_step(plan, output)
if rank() == 0:
    state = {n: t for n, t in method.state().items()}
    torch.save({"loss": loss, **grads, **state}, FILE)
"""


@pytest.mark.parametrize("method", ["moco", "simclr", "dino", "finetune"])
def test_two_processes_are_one(run_ranks, tmp_path: Path, method: str) -> None:
    saved = []
    for ranks in (1, 2):
        file = tmp_path / f"{ranks}.pt"
        run_ranks(f"METHOD, FILE = {method!r}, {str(file)!r}\n{CODE}", ranks)
        saved.append(torch.load(file))
    one, two = saved
    assert one.keys() == two.keys()
    assert len(one) > 40
    for name, want in one.items():
        torch.testing.assert_close(two[name], want, atol=1e-9, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
