"""The momentum encoder's average and what its network computes with."""

import math

import pytest
import torch
from torch import nn

from pipeline.models.momentum import CLOSED, MomentumEncoder

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_of_what_no_longer_learns_closes_its_gap_and_rests(dtype: torch.dtype) -> None:
    encoder = make_encoder(0, dtype)
    weight, bias = encoder._online
    with torch.no_grad():
        weight += 1.0
        bias += 1.0
    before = encoder.state()["weight"].clone()
    weight.requires_grad_(False)
    closing = math.ceil(math.log(CLOSED) / math.log(0.9))
    for update in range(1, closing):
        encoder.update(0.9)
        # Until then a plain average.
        torch.testing.assert_close(encoder.state()["weight"], before + (1 - 0.9**update), atol=1e-5, rtol=0)
        assert encoder.shared_layers([[weight]]) == 0
    encoder.update(0.9)
    assert torch.equal(encoder.state()["weight"], weight.detach())
    assert torch.equal(next(encoder.network.parameters()), weight.detach().to(dtype))
    assert encoder.shared_layers([[weight]]) == 1
    assert encoder.shared_layers([[weight, bias]]) == 0
    assert encoder.shared_layers([[bias], [weight]]) == 0
    # It rests: nobody looks at the online weights any more.
    with torch.no_grad():
        weight += 1.0
    kept, moved = (encoder.state()[name].clone() for name in ("weight", "bias"))
    encoder.update(0.9)
    assert torch.equal(encoder.state()["weight"], kept)
    assert not torch.equal(encoder.state()["bias"], moved)


def test_what_learns_again_is_followed_again() -> None:
    encoder = make_encoder(0, torch.float32)
    weight = encoder._online[0].requires_grad_(False)
    for _ in range(100):
        encoder.update(0.9)
    assert encoder.shared_layers([[weight]]) == 1
    weight.requires_grad_(True)
    with torch.no_grad():
        weight += 1.0
    before = encoder.state()["weight"].clone()
    encoder.update(0.9)
    assert encoder.shared_layers([[weight]]) == 0
    torch.testing.assert_close(encoder.state()["weight"], before + 0.1)


def test_a_restored_average_goes_on_closing_where_it_was() -> None:
    one, other = make_encoder(0, torch.float32), make_encoder(1, torch.float32)
    for encoder in (one, other):
        encoder._online[0].requires_grad_(False)
    with torch.no_grad():
        one._online[0].add_(1.0)
        for mine, theirs in zip(other._online, one._online, strict=True):
            mine.copy_(theirs)
    for _ in range(60):
        one.update(0.9)
    other.load({name: tensor.clone() for name, tensor in one.state().items()})
    for _ in range(60):
        one.update(0.9)
        other.update(0.9)
        for name, tensor in one.state().items():
            assert torch.equal(tensor, other.state()[name])
    assert other.shared_layers([[other._online[0]]]) == 1


def test_a_state_from_before_there_were_gaps_has_them_open() -> None:
    encoder = make_encoder(0, torch.float32)
    state = {name: tensor.clone() for name, tensor in encoder.state().items() if name != "gaps"}
    weight = encoder._online[0].requires_grad_(False)
    for _ in range(100):
        encoder.update(0.9)
    encoder.load(state)
    assert encoder.shared_layers([[weight]]) == 0
