"""k-NN against a literal reference, and the probe's share of the time."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data.loader import LoaderConfig
from pipeline.distributed import World
from pipeline.models.vit import ViT, ViTConfig
from pipeline.probes.features import NONE, extract, extract_share
from pipeline.probes.knn import KNNProbe, ProbeConfig, knn_accuracy, knn_scores

WORLD = World(0, 0, 1, torch.device("cpu"))


def literal_knn(support: torch.Tensor, labels: torch.Tensor, query: torch.Tensor, k: int) -> list[int]:
    answers = []
    for q in query.tolist():
        scored = []
        for s, label in zip(support.tolist(), labels.tolist(), strict=True):
            dot = sum(a * b for a, b in zip(q, s, strict=True))
            scored.append((dot / math.hypot(*q) / math.hypot(*s), label))
        votes: dict[int, float] = {}
        for similarity, label in sorted(scored, reverse=True)[:k]:
            votes[label] = votes.get(label, 0) + math.exp(similarity / 0.07)
        answers.append(max(votes, key=votes.__getitem__))
    return answers


@pytest.mark.parametrize("k", [1, 5, 20, 200])
def test_knn_is_the_literal_reference(k: int) -> None:
    torch.manual_seed(k)
    support, query = torch.randn(60, 4), torch.randn(40, 4)
    labels, truth = torch.randint(5, (60,)), torch.randint(5, (40,))
    answers = torch.tensor(literal_knn(support, labels, query, k))
    assert knn_accuracy((support, labels), (query, truth), k, 5) == pytest.approx(
        float((answers == truth).float().mean())
    )


def test_samples_that_do_not_count_are_nobodys_neighbors() -> None:
    torch.manual_seed(0)
    support, query = torch.randn(60, 4), torch.randn(40, 4)
    labels, truth = torch.randint(5, (60,)), torch.randint(5, (40,))
    labels[7:20] = NONE
    some = labels != NONE
    without = knn_scores((support[some], labels[some]), (query, truth), [1, 20, 100], 5)
    scores = knn_scores((support, labels), (query, truth), [1, 20, 100], 5)
    assert [each.top1 for each in scores.values()] == [each.top1 for each in without.values()]


def test_shares_on_two_processes_are_one_set(run_ranks: Callable[..., list[str]]) -> None:
    code = """
    import torch
    from pipeline import distributed
    from pipeline.probes.knn import knn_scores
    world = distributed.start()
    torch.manual_seed(0)
    support, query = torch.randn(60, 4, dtype=torch.float64), torch.randn(40, 4, dtype=torch.float64)
    labels, truth = torch.randint(5, (60,)), torch.randint(5, (40,))
    labels[::7] = -1
    mine = slice(world.rank, None, world.size)
    scores = knn_scores((support[mine], labels[mine]), (query, truth), [1, 5, 20, 45, 100], 5)
    print({k: (each.first.tolist(), each.among_five.tolist()) for k, each in scores.items()})
    distributed.stop()
    """
    alone, together = run_ranks(code, 1), run_ranks(code, 2)
    assert together[0] == together[1] == alone[0]


def test_separable_features_are_classified() -> None:
    torch.manual_seed(0)
    labels = torch.randint(6, (300,))
    features = torch.eye(6)[labels] + 0.1 * torch.randn(300, 6)
    assert knn_accuracy((features[:200], labels[:200]), (features[200:], labels[200:]), 10, 6) == 1.0


@pytest.fixture
def vit() -> ViT:
    torch.manual_seed(0)
    return ViT(ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 2, 3), seed=0)


def test_features_are_of_the_asked_samples_in_order(vit: ViT, drawn_shards: Path) -> None:
    data = LoaderConfig(shards=str(drawn_shards), threads=1)
    features, labels = extract(vit, data, torch.arange(48).numpy(), WORLD)
    some, some_labels = extract(vit, data, torch.tensor([30, 3, 17]).numpy(), WORLD)
    assert features.shape == (48, 48)
    assert torch.equal(some_labels, labels[[30, 3, 17]])
    torch.testing.assert_close(some, features[[30, 3, 17]], atol=1e-5, rtol=1e-5)
    assert vit.training


def test_images_are_resized_as_the_protocol_says(vit: ViT, drawn_shards: Path) -> None:
    data, ids = LoaderConfig(str(drawn_shards), threads=1), torch.arange(6).numpy()
    usual, bicubic, bilinear = (
        extract_share(vit, data, ids, WORLD, None, *how)[0] for how in ((), ("bicubic",), ("bilinear",))
    )
    assert torch.equal(usual, bicubic)
    assert (usual - bilinear).abs().max() > 1e-3


def test_broken_samples_are_left_out(vit: ViT, drawn_shards: Path, damaged_shards: Path) -> None:
    sound, labels = extract(vit, LoaderConfig(str(drawn_shards), threads=1), torch.arange(48).numpy(), WORLD)
    left, left_labels = extract(vit, LoaderConfig(str(damaged_shards), threads=1), torch.arange(48).numpy(), WORLD)
    kept = [k for k in range(48) if k not in (3, 4)]
    assert torch.equal(left_labels, labels[kept])
    torch.testing.assert_close(left, sound[kept], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shards", ["drawn_shards", "damaged_shards"])
def test_two_processes_extract_the_same(
    run_ranks: Callable[..., list[str]], shards: str, request: pytest.FixtureRequest
) -> None:
    directory = str(request.getfixturevalue(shards))
    code = f"""
    import torch
    from data.loader import LoaderConfig
    from pipeline import distributed
    from pipeline.models.vit import ViT, ViTConfig
    from pipeline.probes.features import extract
    world = distributed.start()
    torch.manual_seed(0)
    vit = ViT(ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 2, 3), seed=0)
    data = LoaderConfig(shards={directory!r}, threads=1)
    features, labels = extract(vit, data, torch.arange(47).numpy(), world)
    print([round(float(v), 4) for v in features[:, 0]], labels.tolist())
    distributed.stop()
    """
    alone, together = run_ranks(code, 1), run_ranks(code, 2)
    assert together[0] == together[1] == alone[0]


def test_probe_stays_within_its_share(drawn_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    data = LoaderConfig(shards=str(drawn_shards))
    probe = KNNProbe(ProbeConfig(share=0.1, support=40, queries=8), data, 48, 4, seed=0)

    def slow_extract(*_: object) -> tuple[torch.Tensor, torch.Tensor]:
        now[0] += 5
        return torch.randn(8, 4), torch.randint(2, (8,))

    monkeypatch.setattr("pipeline.probes.knn.extract", slow_extract)
    monkeypatch.setattr("pipeline.probes.knn.extract_share", slow_extract)
    assert not probe.due(elapsed=10, seconds_per_sample=0.1)
    assert probe.due(elapsed=48, seconds_per_sample=0.1)
    probe.run(None, WORLD, elapsed=48)  # type: ignore[arg-type]
    # It took 10 s, a tenth of the 100 s that must pass before the next.
    assert not probe.due(elapsed=147, seconds_per_sample=0.1)
    assert probe.due(elapsed=148, seconds_per_sample=0.1)


def test_probe_is_off_without_labels_or_share(drawn_shards: Path) -> None:
    data = LoaderConfig(shards=str(drawn_shards))
    assert not KNNProbe(ProbeConfig(share=0), data, 48, 4, 0).due(1e9, 0)
    assert not KNNProbe(ProbeConfig(), data, 48, 0, 0).due(1e9, 0)
