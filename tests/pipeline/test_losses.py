"""Losses against loops in fp64 and hand-computed values."""

import math
from pathlib import Path

import pytest
import torch

from pipeline.losses import centered_softmax, distillation, nt_xent


def reference_nt_xent(a: torch.Tensor, b: torch.Tensor, tau: float) -> torch.Tensor:
    """Eq. 1 of Chen et al., 2020, for the anchors of the first view, sample by sample."""
    a, b = (each / each.norm(dim=1, keepdim=True) for each in (a, b))
    total = a.new_zeros(())
    for i in range(len(a)):
        positive = torch.dot(a[i], b[i]) / tau
        others = [torch.dot(a[i], b[j]) / tau for j in range(len(b))]
        others += [torch.dot(a[i], a[j]) / tau for j in range(len(a)) if j != i]
        total = total + torch.logsumexp(torch.stack(others), 0) - positive
    return total / len(a)


def test_nt_xent_is_the_reference_in_fp64() -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ours, want = nt_xent(a, b, 0.1, symmetric=False), reference_nt_xent(a, b, 0.1)
    torch.testing.assert_close(ours, want, atol=1e-12, rtol=0)
    for got, expected in zip(torch.autograd.grad(ours, (a, b)), torch.autograd.grad(want, (a, b)), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_nt_xent_at_chance_counts_all_but_oneself() -> None:
    same = torch.ones(8, 3)
    assert float(nt_xent(same, same, 0.1, symmetric=True)) == pytest.approx(math.log(15), abs=1e-6)


TWO_RANKS = """
import torch
from pipeline.distributed import start, rank, world_size
from pipeline.losses import nt_xent

start()
torch.manual_seed(0)
a, b = (torch.randn(8, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
mine = slice(rank() * 8 // world_size(), (rank() + 1) * 8 // world_size())
loss = nt_xent(a[mine], b[mine], 0.1, symmetric=True)
grads = torch.stack(torch.autograd.grad(loss, (a, b)))
total = loss.detach().clone()
if world_size() > 1:
    torch.distributed.all_reduce(grads)
    torch.distributed.all_reduce(total)
if rank() == 0:
    torch.save([total / world_size(), grads / world_size()], FILE)
"""


def test_two_processes_have_the_gradient_of_the_whole_batch(run_ranks, tmp_path: Path) -> None:
    results = []
    for ranks in (1, 2):
        file = tmp_path / f"{ranks}.pt"
        run_ranks(f"FILE = {str(file)!r}\n{TWO_RANKS}", ranks)
        results.append(torch.load(file))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(two, one, atol=1e-12, rtol=0)


def test_centered_softmax_by_hand() -> None:
    logits, center = torch.tensor([[0.3, 0.1]]), torch.tensor([0.1, 0.0])
    # (0.3 - 0.1) / 0.1 = 2 against 0.1 / 0.1 = 1.
    want = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(centered_softmax(logits, center, 0.1), torch.tensor([[want, 1 - want]]))


def test_distillation_is_the_mean_over_pairs_of_different_views() -> None:
    torch.manual_seed(0)
    students = {view: torch.randn(4, 7, dtype=torch.float64) for view in (0, 1, 2)}
    targets = {view: torch.softmax(torch.randn(4, 7, dtype=torch.float64), 1) for view in (0, 1)}
    terms = []
    for t, target in targets.items():
        for s, student in students.items():
            for i in range(4 if s != t else 0):
                exponentials = [math.exp(float(x) / 0.1) for x in student[i]]
                log = [math.log(x / sum(exponentials)) for x in exponentials]
                terms.append(-sum(float(p) * q for p, q in zip(target[i], log, strict=True)))
    assert len(terms) == 4 * 4
    assert float(distillation(students, targets, 0.1)) == pytest.approx(sum(terms) / len(terms), abs=1e-9)
