"""Which tensor is in which group, and what an optimizer cannot be told."""

from collections.abc import Callable

import pytest
import torch

from pipeline.methods.moco import MoCo
from pipeline.optim import HEADS, LAST_LAYER, VECTORS, OptimConfig, adamw, parameter_groups


def test_groups_are_named_by_layer_and_hold_what_learns(make_moco: Callable[..., MoCo]) -> None:
    moco = make_moco()
    groups = parameter_groups(moco.layers(), moco.parameters())
    assert [g["name"] for g in groups] == ["layer00", "layer01", "layer02", "layer03", HEADS]
    # The random patch projection never learns; the class token is all that is left of layer 0.
    assert [p.shape for p in groups[0]["params"]] == [moco.encoder.class_token.shape]
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in moco.parameters())


def test_vectors_can_be_left_out_of_weight_decay_and_the_last_layer_is_a_group(make_moco: Callable[..., MoCo]) -> None:
    moco = make_moco()
    last = [moco.predictor[3].weight]
    groups = parameter_groups(moco.layers(), moco.parameters(), last, decay_vectors=False)
    blocks = [name for i in (1, 2, 3) for name in (f"layer0{i}", f"layer0{i}{VECTORS}")]
    # The class token [1, 1, D] is no vector; the last layer has none.
    assert [g["name"] for g in groups] == ["layer00", *blocks, LAST_LAYER, HEADS, HEADS + VECTORS]
    for group in groups:
        assert all((p.ndim <= 1) == group["name"].endswith(VECTORS) for p in group["params"])
    assert [id(p) for g in groups if g["name"] == LAST_LAYER for p in g["params"]] == [id(last[0])]
    members = [id(p) for g in groups for p in g["params"]]
    assert sorted(members) == sorted(id(p) for p in moco.parameters() if p.requires_grad)


def test_what_never_decays_is_with_the_vectors(make_moco: Callable[..., MoCo]) -> None:
    moco = make_moco()
    token = moco.encoder.class_token
    for decay_vectors in (False, True):
        groups = parameter_groups(moco.layers(), moco.parameters(), decay_vectors=decay_vectors, undecayed=[token])
        assert [p.shape for g in groups if g["name"] == f"layer00{VECTORS}" for p in g["params"]] == [token.shape]
        assert any(g["name"] == f"layer01{VECTORS}" for g in groups) is not decay_vectors
        members = [id(p) for g in groups for p in g["params"]]
        assert sorted(members) == sorted(id(p) for p in moco.parameters() if p.requires_grad)


def test_a_cpu_steps_in_one_pass(make_moco: Callable[..., MoCo]) -> None:
    moco = make_moco()
    for device, on_host, fused in (("cpu", False, True), ("meta", True, True), ("meta", False, None)):
        groups = parameter_groups(moco.layers(), moco.parameters())
        moved = [{**g, "params": [torch.nn.Parameter(p.to(device)) for p in g["params"]]} for g in groups]
        assert {g["fused"] for g in adamw(moved, OptimConfig(), on_host=on_host).param_groups} == {fused}


def test_the_optimizer_has_the_configs_numbers(make_moco: Callable[..., MoCo]) -> None:
    moco = make_moco()
    groups = parameter_groups(moco.layers(), moco.parameters())
    optimizer = adamw(groups, OptimConfig(betas=[0.8, 0.95], weight_decay=0.3))
    assert {(group["betas"], group["weight_decay"]) for group in optimizer.param_groups} == {((0.8, 0.95), 0.3)}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"weight_decay": -1.0}, r"clip and optim\.clip_each must be finite numbers of at least 0, got -1, 0 and 0"),
        ({"clip_each": -3.0}, r"clip and optim\.clip_each must be finite numbers of at least 0, got 0\.1, 0 and -3"),
        (
            {"clip": 1.0, "clip_each": 3.0},
            r"optim\.clip .* and optim\.clip_each .* exclude each other, got 1 and 3; set",
        ),
        ({"betas": [0.9]}, r"optim\.betas must be two numbers in \[0, 1\), got \[0\.9\]"),
    ],
)
def test_bad_optimizer_values_are_refused(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        OptimConfig(**arguments)  # type: ignore[arg-type]
