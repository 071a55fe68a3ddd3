"""What GPUs can do at best, by NVIDIA's data sheets: dense products of matrices, without sparsity."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from pipeline.engine_config import Precision

TERA = 10**12


@dataclass(frozen=True)
class Peak:
    """TFLOPS of the tensor cores in bf16 and TF32, and of the other cores in fp32; None: not in hardware."""

    bf16: float | None
    tf32: float | None
    fp32: float


# By what torch.cuda.get_device_name() says; the first that fits. What most sheets print large, with sparsity, is twice
# as much.
PEAKS = (
    (r"B200", Peak(2250, 1125, 75)),
    (r"H200 NVL", Peak(835, 417, 60)),
    (r"H200", Peak(989, 494, 67)),
    (r"H100 PCIe", Peak(756, 378, 51)),
    (r"H100 NVL", Peak(835, 417, 60)),
    (r"H100", Peak(989, 494, 67)),
    (r"A100", Peak(312, 156, 19.5)),
    (r"L40S", Peak(362, 183, 91.6)),
    (r"A10", Peak(125, 62.5, 31.2)),
    # Its tensor cores know fp16 only.
    (r"V100S-PCIE", Peak(None, None, 16.4)),
    (r"V100-PCIE", Peak(None, None, 14)),
    (r"V100-SXM2", Peak(None, None, 15.7)),
)


def peak_flops(teraflops: float, precision: Precision, device: torch.device) -> float | None:
    """Return the FLOPS that this process's device is held against; None where nobody knows.

    `teraflops` is what the user says, 0 for nothing: then the table speaks for a GPU.
    """
    if teraflops:
        return teraflops * TERA
    if device.type != "cuda":
        return None
    tf32 = torch.backends.cuda.matmul.allow_tf32
    known = known_teraflops(torch.cuda.get_device_name(device), precision, tf32=tf32)
    return None if known is None else known * TERA


def known_teraflops(name: str, precision: Precision, *, tf32: bool) -> float | None:
    """Return the peak of a GPU by its name; None for one that is not in the table, or a format that it does not have.

    A part of a GPU (MIG) is not in the table, whatever its name begins with.
    """
    found = [peak for pattern, peak in PEAKS if re.search(rf"\b{pattern}\b", name) and "MIG" not in name]
    if not found:
        return None
    if precision is Precision.bf16:
        return found[0].bf16
    return found[0].tf32 if tf32 and found[0].tf32 else found[0].fp32
