"""What is computed over the global batch is the same on one process and on two."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline import distributed
from pipeline.distributed import GlobalBatchNorm


def test_batch_norm_alone_is_torchs_own() -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 6, dtype=torch.float64, requires_grad=True)
    ours, torchs = GlobalBatchNorm(6).double(), torch.nn.BatchNorm1d(6).double()
    weights = torch.randn(32, 6, dtype=torch.float64)
    for step in range(3):
        out, want = ours(x + step), torchs(x + step)
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(
            torch.autograd.grad((out * weights).sum(), x)[0],
            torch.autograd.grad((want * weights).sum(), x)[0],
        )
    assert not list(ours.buffers())


def test_two_processes_normalize_and_differentiate_as_one(run_ranks: Callable[..., list[str]]) -> None:
    outputs = run_ranks(
        """
        import torch
        from pipeline import distributed
        from pipeline.losses import info_nce
        world = distributed.start()
        torch.manual_seed(0)
        whole, key = torch.randn(16, 6, dtype=torch.float64), torch.randn(16, 6, dtype=torch.float64)

        def loss(norm, x, keys, all_keys=None):
            return info_nce(norm(x), keys, 0.2)

        mine = whole.chunk(2)[world.rank].clone().requires_grad_()
        norm = distributed.GlobalBatchNorm(6).double()
        value = info_nce(norm(mine), key.chunk(2)[world.rank], 0.2)
        value.backward()
        mean = distributed.mean_over_ranks(value)

        # The same with torch's batch norm and cross entropy on the whole batch.
        x = whole.clone().requires_grad_()
        plain = torch.nn.BatchNorm1d(6).double()
        q, k = torch.nn.functional.normalize(plain(x)), torch.nn.functional.normalize(key)
        want = torch.nn.functional.cross_entropy(q @ k.T / 0.2, torch.arange(16)) * 0.4
        want.backward()
        assert abs(mean - want.detach()) < 1e-12, (mean, want)
        # Gradients are averaged over processes afterwards, so each carries the factor 2.
        error = (mine.grad / 2 - x.grad.chunk(2)[world.rank]).abs().max()
        assert error < 1e-12, error
        assert distributed.any_rank(world.rank == 1, False) == (True, False)
        assert distributed.from_main(world.rank) == 0
        try:
            distributed.on_main(lambda: int("nonsense"))
        except ValueError as error:
            print("refused", "nonsense" in str(error))
        distributed.stop()
        """,
        ranks=2,
    )
    assert [o.strip() for o in outputs] == ["refused True", "refused True"]


def test_half_described_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match=r"RANK=0 is set but LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not"):
        distributed.start()


def test_a_port_that_somebody_else_has_is_one_sentence_and_another_try(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(somebody.getsockname()[1])}
        environment = {**os.environ, **address, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
        command = [sys.executable, "-m", "pipeline.cli", "doctor", f"runs={tmp_path}"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 76, done.stderr
    assert re.fullmatch(
        r"coldpress: process 0 on \S+ cannot meet the others at 127\.0\.0\.1:\d+: somebody else listens there; "
        r"try again, or set MASTER_PORT\.\n",
        done.stderr,
    )
