"""DINO's head with batch norm against PyTorch's own."""

import torch
import torch.nn.functional as F

from pipeline.models.heads import PrototypeHead


def test_batch_norm_stands_behind_both_hidden_layers() -> None:
    torch.manual_seed(0)
    head = PrototypeHead(6, 8, 5, 7, unit_norm=True, batch_norm=True).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(10, 6, dtype=torch.float64)
    first, norm, _, second, other, _, third = head.mlp
    expected = x
    for linear, batch_norm in ((first, norm), (second, other)):
        expected = F.linear(expected, linear.weight, linear.bias)  # type: ignore[arg-type]
        expected = F.gelu(F.batch_norm(expected, None, None, batch_norm.weight, batch_norm.bias, training=True))  # type: ignore[arg-type]
    expected = F.normalize(F.linear(expected, third.weight, third.bias), dim=1)  # type: ignore[arg-type]
    expected = expected @ F.normalize(head.prototypes.direction, dim=1).T
    torch.testing.assert_close(head(x), expected, atol=1e-12, rtol=0)


def test_without_it_there_is_none() -> None:
    head = PrototypeHead(6, 8, 5, 7, unit_norm=True)
    assert [type(module).__name__ for module in head.mlp] == ["Linear", "GELU", "Linear", "GELU", "Linear"]
