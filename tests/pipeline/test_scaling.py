"""Steps on many GPUs by hand: what computes, what travels, what waits."""

from pathlib import Path

import pytest
import torch

from pipeline.compose import load
from pipeline.compression import Compression
from pipeline.engine_config import EngineConfig, Precision
from pipeline.flops import step_flops
from pipeline.methods import Method, MoCoConfig, build_method
from pipeline.models.vit import ViT, ViTConfig
from pipeline.plan import run
from pipeline.scaling import ClusterConfig, scaled_steps
from pipeline.schedules import StepPlan
from pipeline.traffic import Collective, Kind, What, step_traffic, total

CLUSTER = ClusterConfig(
    teraflops=2.0,
    gpus_per_node=4,
    node_gigabytes_per_second=50.0,
    network_gigabytes_per_second=10.0,
    latency_microseconds=5.0,
)
ENGINE = EngineConfig(Precision.bf16, 1)
PLAN = StepPlan(0.5, 1e-3, 0.1, 0.99, (1e-3,) * 4, Compression(), Compression(), 1e-3, 0.07)


@pytest.fixture
def moco() -> Method:
    with torch.device("meta"):
        return build_method(
            MoCoConfig(hidden_dim=64, out_dim=32), ViT(ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 3, 3), 0)
        )


def test_a_collective_takes_its_bytes_over_the_slowest_link_and_a_latency_for_each_doubling() -> None:
    gradients = Collective(What.gradients, Kind.all_reduce, 10**9, calls=3)
    # 2 x 3/4 GB at 50 GB/s, and three calls of two doublings.
    assert CLUSTER.seconds(gradients, 4) == pytest.approx(0.030 + 3 * 2 * 5e-6)
    # 2 x 15/16 GB at 10 GB/s, and three calls of four.
    assert CLUSTER.seconds(gradients, 16) == pytest.approx(0.1875 + 3 * 4 * 5e-6)
    assert CLUSTER.seconds(Collective(What.weights, Kind.all_gather, 10**9), 4) == pytest.approx(0.015 + 2 * 5e-6)


def test_a_step_computes_and_communicates(moco: Method) -> None:
    (step,) = scaled_steps(moco, PLAN, ENGINE, CLUSTER, batch_size=64, ranks=[4])
    traffic = step_traffic(moco, PLAN, ENGINE, 4, 16)
    assert (step.gpus, step.local_batch) == (4, 16)
    assert step.compute == pytest.approx(step_flops(moco, PLAN, 16) / 2e12)
    assert step.communication == pytest.approx(sum(CLUSTER.seconds(each, 4) for each in traffic))
    assert step.reduced_bytes + step.gathered_bytes + step.batch_bytes == total(traffic)
    assert step.apart == step.compute + step.communication
    assert step.apart - step.together == pytest.approx(min(step.reduction, 2 / 3 * step.compute))


def test_weak_scaling_keeps_the_batch_of_each_and_strong_the_batch_of_all(moco: Method) -> None:
    steps = scaled_steps(moco, PLAN, ENGINE, CLUSTER, batch_size=96, ranks=[64, 2, 8, 8])
    # 96 samples cannot be shared by 64.
    assert [(step.gpus, step.scaling, step.local_batch) for step in steps] == [
        (2, "", 48),
        (8, "weak", 48),
        (8, "strong", 12),
        (64, "weak", 48),
    ]
    two, weak, strong, many = steps
    assert two.compute == weak.compute == many.compute == pytest.approx(4 * strong.compute, rel=0.01)
    # Bytes of gradients stay, keys and batch statistics of all are gathered by each.
    assert two.reduced_bytes == weak.reduced_bytes == strong.reduced_bytes == many.reduced_bytes
    assert two.batch_bytes < strong.batch_bytes < weak.batch_bytes < many.batch_bytes


def test_one_gpu_only_computes(moco: Method) -> None:
    (step,) = scaled_steps(moco, PLAN, ENGINE, CLUSTER, batch_size=8, ranks=[1])
    assert step.communication == 0
    assert step.apart == step.together == step.compute


def test_a_plan_prints_the_dearest_and_the_cheapest_step_and_what_it_assumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run=p", f"runs={tmp_path}", "model.depth=2", "batch_size=256", "budget.value=10", "ranks=[8,64]"]
    words += ["compression=staged", "compression.stages=[{until:0.5,patch_size:28,dropout:0.5}]"]
    run(load("plan", [*words, "cluster.teraflops=123", "cluster.network_gigabytes_per_second=45"]))
    said = capsys.readouterr().out
    tables = [line for line in said.splitlines() if line.startswith("scaling of a step")]
    assert tables == [
        "scaling of a step with patch 16, dropout 0.000, 0 frozen layers:",
        "scaling of a step with patch 28, dropout 0.500, 0 frozen layers:",
    ]
    rows = [line.split()[:3] for line in said.splitlines() if line.split()[:1] in (["8"], ["64"])]
    assert rows == 2 * [["8", "256", "32"], ["64", "weak", "2,048"], ["64", "strong", "256"]]
    assert "nothing is measured" in said
    assert "123 TFLOPS" in said
    assert "45 GB/s beyond" in said


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("ranks=[0,8]", r"ranks must be numbers of GPUs from 1 to batch_size=256, got \[0, 8\]"),
        ("ranks=[512]", r"ranks must be numbers of GPUs from 1 to batch_size=256, got \[512\]"),
        ("cluster.teraflops=0", "cluster.teraflops must be above 0, got 0"),
        ("cluster.network_gigabytes_per_second=inf", "cluster.network_gigabytes_per_second must be above 0, got inf"),
        ("cluster.gpus_per_node=0", "cluster.gpus_per_node must be at least 1, got 0"),
        ("cluster.latency_microseconds=-1", "cluster.latency_microseconds must be at least 0, got -1"),
    ],
)
def test_impossible_clusters_are_refused_by_name(word: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load("plan", ["run=p", "budget.value=1", word])
