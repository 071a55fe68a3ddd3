"""The benchmark runs and promises what the cost formula says; speed itself is not tested."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.bench import BENCHMARKS, run
from pipeline.benchmarks import checkpoint, monitoring
from pipeline.benchmarks.freezing import Row, time_shares, whole_run
from pipeline.benchmarks.loop import bench_loop
from pipeline.benchmarks.memory import kept_for_backward
from pipeline.benchmarks.scale import bench_scale
from pipeline.benchmarks.split import PARTS
from pipeline.benchmarks.step import missing
from pipeline.compose import load
from pipeline.distributed import World

SMALL = ["model.name=vit_tiny_patch16_224", "model.image_size=32", "model.patch_size=8", "model.depth=2"]
SMALL += ["method.hidden_dim=32", "method.out_dim=16", "engine.precision=fp32", "batch_size=4", "rounds=1"]


def measure(tmp_path: Path, *overrides: str) -> list[dict[str, Any]]:
    output = tmp_path / "bench.json"
    run(load("bench", [*SMALL, f"output={output}", *overrides]), overrides)
    content = json.loads(output.read_text())
    assert content["command"] == shlex.join(["coldpress", "bench", *overrides])
    rows: list[dict[str, Any]] = content["rows"]
    return rows


def test_cells_against_the_uncompressed_step(
    tmp_path: Path, drawn_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["patch_sizes=[16]", "dropouts=[0,0.5]", "rounds=2", "peak_teraflops=0.5"]
    rows = measure(tmp_path, "what=step", *words, f"data.shards={drawn_shards}", "data.threads=1")
    # The uncompressed one comes first, asked for or not.
    assert [(r["patch_size"], r["dropout"]) for r in rows] == [(8, 0), (16, 0), (16, 0.5)]
    assert [r["promised"] for r in rows] == pytest.approx([1.0, 68 / 20, 68 / (3 * 3 + 5)])
    for row in rows:
        check_cell(row)
    kept = [r["kept_mib"] for r in rows]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > 2 * kept[2]
    said = capsys.readouterr().out
    assert "realized" in said
    assert "Least realized: patch" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.png"]
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def check_cell(row: dict[str, Any]) -> None:
    """Recompute a row's figures from its rounds."""
    ratios = [a / b for a, b in zip(row["rounds"]["uncompressed"], row["rounds"]["own"], strict=True)]
    assert len(ratios) == 2
    assert row["speedup"] == pytest.approx(sum(ratios) / 2)
    assert row["realized"] == pytest.approx(row["speedup"] / row["promised"])
    assert row["milliseconds"] == pytest.approx(1e3 * sum(row["rounds"]["own"]) / 2)
    assert row["uncompressed_ms"] == pytest.approx(1e3 * sum(row["rounds"]["uncompressed"]) / 2)
    assert row["sample_ms"] == pytest.approx(row["milliseconds"] / 4)
    assert row["mfu"] == pytest.approx(row["teraflops"] / 0.5)
    assert sum(row[f"{part}_ms"] for part in PARTS) == pytest.approx(row["split_ms"], rel=1e-6)
    # One process gathers nothing.
    assert all(row[f"{part}_ms"] > 0 for part in PARTS if part != "gathers")
    assert row["host_ms"] > 0
    assert row["recompiles"] == 0
    assert row["waiting"] == pytest.approx(row["data_ms"] / row["fed_ms"])


def test_our_step_against_a_plain_loop(tmp_path: Path, drawn_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, loop = measure(tmp_path, "what=loop", f"data.shards={drawn_shards}", "data.threads=1")
    assert (ours["case"], loop["case"]) == ("coldpress", "plain PyTorch loop")
    assert ours["ratio"] == pytest.approx(loop["rounds"][0] / ours["rounds"][0])
    assert loop["ratio"] == loop["fed_ratio"] == 1.0
    assert ours["samples_per_second"] == pytest.approx(4 / ours["rounds"][0])
    for row in (ours, loop):
        assert all(row[f"{part}_ms"] > 0 for part in ("forward", "backward", "optimizer", "momentum"))
        assert row["fed_ms"] > row["data_ms"] > 0
    assert "as fast as the loop" in capsys.readouterr().out


def test_steps_on_one_and_two_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = measure(tmp_path, "what=scale")
    assert [(r["case"], r["processes"], r["batch"]) for r in rows] == [
        ("1 process", 1, 4),
        ("2 processes, weak", 2, 8),
        ("2 processes, strong", 2, 4),
    ]
    alone, weak, strong = (r["rounds"][0] for r in rows)
    assert [r["efficiency"] for r in rows] == pytest.approx([1.0, alone / weak, alone / (2 * strong)])
    for row in rows[1:]:
        assert row["megabytes"] == pytest.approx(row["expected_megabytes"], rel=1e-3)
        assert all(row[f"{part}_ms"] > 0 for part in PARTS)
    assert "megabytes" not in rows[0]
    assert "MB sent" in capsys.readouterr().out


def test_saves_against_deepspeeds_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "RESUMES", 1)
    ours, theirs = measure(tmp_path, "what=checkpoint")
    assert 0 < ours["stall"] <= ours["durable"]
    assert 0 < theirs["stall"] <= theirs["durable"]
    # The same weights and moments, but for headers, and for a momentum encoder that both keep whole.
    assert ours["megabytes"] == pytest.approx(theirs["megabytes"], rel=0.2)
    (resumed,) = json.loads((tmp_path / "bench.json").read_text())["resumes"]
    assert ours["resume"] == pytest.approx(sum(resumed.values()))
    assert all(seconds > 0 for seconds in resumed.values())
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_what_watching_takes_adds_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, few in {"STEPS": 20, "REPORTS": 5, "SCRAPES": 3}.items():
        monkeypatch.setattr(monitoring, name, few)
    *parts, every_second, total = measure(tmp_path, "what=monitoring")
    assert len(parts) == 4
    assert all(row["microseconds"] > 0 for row in (*parts, every_second))
    marks, counts, report, scrape = (row["microseconds"] for row in parts)
    # By hand: a report every 10 steps, a scrape every 75 steps of 0.2 s.
    assert total["share_long"] == pytest.approx(100 * (marks + counts + report / 10 + scrape / 75) / 0.2e6)
    assert total["of_step"] == pytest.approx(sum(row["of_step"] for row in parts))
    assert every_second["share"] == pytest.approx(15 * parts[3]["share"])
    assert " % that it may take." in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_frozen_layers_against_a_twin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = measure(tmp_path, "what=freezing")
    assert [r["frozen"] for r in rows] == [0, 1, 2]
    # One of two blocks keeps its forward and loses its backward: of 3 + 1 forwards one is gone; heads do not freeze.
    assert [r["ideal"] for r in rows] == pytest.approx([1.0, 1.0, 3 / 4], abs=0.02)
    assert rows[2]["ideal"] > 3 / 4
    assert all(r["milliseconds"] > 0 for r in rows)
    assert rows[0]["optimizer_mib"] > rows[1]["optimizer_mib"] > rows[2]["optimizer_mib"]
    assert rows[1]["activation_mib"] > 1.2 * rows[2]["activation_mib"]
    assert rows[2]["realized"] == pytest.approx((1 - rows[2]["ratio"]) / (1 - rows[2]["ideal"]))
    assert "that could be saved" in capsys.readouterr().out


def test_what_is_kept_for_the_backward_is_counted_once_and_without_parameters() -> None:
    class Squares(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1000))

        def forward(self, batch: torch.Tensor, plan: object) -> torch.Tensor:
            product = self.weight * batch  # keeps both: the weight is no activation
            return (product * product).sum()  # keeps the product twice

    assert kept_for_backward(Squares(), torch.ones(1000), None) == 2 * 4000  # type: ignore[arg-type]


def test_a_whole_run_is_made_of_its_steps() -> None:
    shares = time_shares(13)
    assert sum(shares) == pytest.approx(1.0)
    # Paper B: the first layer freezes after 56.08 of 100 epochs, the last but one after 95.57.
    assert (shares[0], shares[-1]) == pytest.approx((0.5608, 1 - 0.9557), abs=1e-4)
    rows = [Row(i, 100.0, 1 - 0.04 * i, 1.0, 1.0, 1 - 0.05 * i, 0, None, 0, 0.5 * (i > 0)) for i in range(13)]
    frozen = sum(share * i for i, share in enumerate(shares))
    said = whole_run(rows)
    assert f"{0.04 * frozen:.1%} less time of {0.05 * frozen:.1%} that could be saved, 80% of it" in said
    assert "all 12 freezes together take 6.0 s" in said


def test_targets_are_measured_both_ways(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    words = [w for w in SMALL if not w.startswith("method.")]
    words += ["method=localmim", "method.taps=[1,2]", "method.doublings=[1,0]", "method.decoder_dim=32"]
    run(load("bench", [*words, "what=targets", f"output={output}"]))
    ours, theirs = json.loads(output.read_text())["rows"]
    assert (ours["case"], ours["ratio"]) == ("one pass", 1.0)
    assert theirs["milliseconds"] > 0


def test_steps_are_not_compressed_where_they_cannot_be() -> None:
    words = [w for w in SMALL if not w.startswith("method.")]
    with pytest.raises(ValueError, match="method=localmim takes no compression"):
        run(load("bench", [*words, "what=step", "method=localmim"]))


def test_there_is_no_plain_loop_of_every_method() -> None:
    words = [w for w in SMALL if not w.startswith("method.")]
    with pytest.raises(ValueError, match="what=loop has plain loops of MoCo, SimCLR, DINO, not of LocalMIM"):
        run(load("bench", [*words, "what=loop", "method=localmim"]))


def test_a_batch_that_processes_cannot_share_is_refused_before_they_start() -> None:
    with pytest.raises(
        ValueError, match=r"batch_size must be divisible .*, got 4 and ranks=\[1, 3\]; take a multiple of 3"
    ):
        run(load("bench", [*SMALL, "what=scale", "ranks=[3,1]"]))
    with pytest.raises(ValueError, match=r"engine\.micro_batch must be 0 with MoCo"):
        run(load("bench", [*SMALL, "what=scale", "engine.micro_batch=2"]))


def test_what_measures_or_starts_one_process_is_refused_in_several() -> None:
    two = World(0, 0, 2, torch.device("cpu"))
    for measure_in, sentence in (
        (bench_loop, "what=loop measures one process, not 2"),
        (bench_scale, "what=scale starts its own processes, and runs in 2"),
    ):
        with pytest.raises(ValueError, match=sentence):
            measure_in(load("bench", SMALL), two)


def test_targets_of_other_methods_are_refused() -> None:
    with pytest.raises(ValueError, match="what=targets measures LocalMIM's; say method=localmim"):
        run(load("bench", [*SMALL, "what=targets"]))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["what=checkpoint"],
            "bench what=checkpoint measures against DeepSpeed's own saves, which engine=fsdp2 does not",
        ),
        (["what=freezing"], "bench what=freezing counts what a forward beside the engine keeps, and with engine=fsdp2"),
        (["what=step", "model.compile=true"], r"model\.compile must be false with engine=fsdp2"),
    ],
)
def test_what_fsdp2_has_no_part_in_is_refused(tmp_path: Path, words: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        measure(tmp_path, *words, "engine=fsdp2")


def test_an_unknown_benchmark_is_refused_with_the_names_of_all() -> None:
    with pytest.raises(ValueError, match=f"what must be one of {', '.join(BENCHMARKS)}, all, got zebra"):
        run(load("bench", [*SMALL, "what=zebra"]))


def test_no_directory_for_the_output_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="output: no directory for"):
        run(load("bench", [*SMALL, f"output={tmp_path}/no/bench.json"]))


def test_what_takes_longer_than_promised_is_named_by_its_part() -> None:
    """The cell ran while the machine was half as fast as for the first row: 80 ms there are 160 here, 40 promised."""

    def cell(case: str, realized: float, promised: float, uncompressed: float, **parts: float) -> dict[str, Any]:
        every = {f"{part}_ms": parts.get(part, 0.0) for part in PARTS}
        row = {"case": case, "realized": realized, "promised": promised, "uncompressed_ms": uncompressed}
        return row | every | {"split_ms": sum(every.values()), "milliseconds": 80.0}

    rows = [
        cell("whole", 1.0, 1.0, 80.0, forward=30, backward=40, optimizer=10),
        cell("crushed", 0.7, 4.0, 160.0, forward=15, backward=22, optimizer=20),
        cell("mild", 0.9, 2.0, 160.0, forward=30, backward=40, optimizer=20),
    ]
    (said,) = missing(rows)
    assert said == (
        "Least realized: crushed, 0.70; its parts take 57.0 ms of 40.0 promised: optimizer +15.0, backward +2.0."
    )
    assert missing(rows[:1]) == []
