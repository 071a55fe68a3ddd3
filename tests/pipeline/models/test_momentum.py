"""The momentum encoder's average and what its network computes with."""

import torch
from torch import nn

from pipeline.models.momentum import MomentumEncoder

CPU = torch.device("cpu")


def make_encoder(seed: int, dtype: torch.dtype) -> MomentumEncoder:
    torch.manual_seed(seed)
    encoder = MomentumEncoder(nn.Linear(5, 4))
    encoder.to(CPU, dtype)
    return encoder


def test_what_is_loaded_is_what_the_network_computes_with() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        saved, restored = make_encoder(0, dtype), make_encoder(1, dtype)
        restored.load({name: tensor.clone() for name, tensor in saved.state().items()})
        for got, want in zip(restored.network.parameters(), saved.network.parameters(), strict=True):
            assert torch.equal(got, want)


def test_an_average_moves_where_bf16_would_stand_still() -> None:
    encoder = make_encoder(0, torch.bfloat16)
    before = encoder.state()["weight"].clone()
    online = encoder._online[0].detach()
    online += 1.0
    for _ in range(1000):
        encoder.update(0.9999)
    # 1 - 0.9999^1000, in steps that bf16 cannot take.
    torch.testing.assert_close(encoder.state()["weight"], before + (1 - 0.9999**1000), atol=1e-4, rtol=0)
    assert torch.equal(next(encoder.network.parameters()), encoder.state()["weight"].bfloat16())
