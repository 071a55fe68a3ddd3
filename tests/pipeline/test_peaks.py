"""Names as CUDA gives them, and NVIDIA's numbers."""

import pytest
import torch

from pipeline.engine_config import Precision
from pipeline.peaks import known_teraflops, peak_flops

BF16, FP32 = Precision.bf16, Precision.fp32


@pytest.mark.parametrize(
    ("name", "bf16", "tf32", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 156, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 156, 19.5),
        ("NVIDIA H100 80GB HBM3", 989, 494, 67),
        ("NVIDIA H100 PCIe", 756, 378, 51),
        ("NVIDIA H100 NVL", 835, 417, 60),
        ("NVIDIA H200", 989, 494, 67),
        ("NVIDIA L40S", 362, 183, 91.6),
        ("NVIDIA A10", 125, 62.5, 31.2),
        ("NVIDIA B200", 2250, 1125, 75),
        ("Tesla V100-SXM2-32GB", None, 15.7, 15.7),
        # Half of an A10's, another sheet; a part of one; none of NVIDIA's servers.
        ("NVIDIA A10G", None, None, None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None, None, None),
        ("NVIDIA GeForce RTX 4090", None, None, None),
    ],
)
def test_known_gpus(name: str, bf16: float | None, tf32: float | None, fp32: float | None) -> None:
    assert known_teraflops(name, BF16, tf32=True) == bf16
    assert known_teraflops(name, FP32, tf32=True) == tf32
    assert known_teraflops(name, FP32, tf32=False) == fp32


def test_what_the_user_says_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-40GB")
    gpu = torch.device("cuda", 3)
    assert peak_flops(2.5, BF16, gpu) == peak_flops(2.5, BF16, torch.device("cpu")) == 2.5e12
    assert peak_flops(0, BF16, gpu) == 312e12
    assert peak_flops(0, FP32, gpu) == 19.5e12
    assert peak_flops(0, BF16, torch.device("cpu")) is None
