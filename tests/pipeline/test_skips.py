"""Steps that changed nothing: said once each, and fatal in a row."""

import json
import logging
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data.loader import Loader, LoaderConfig
from data.manifest import Manifest
from data.order import ShuffledOrder
from data.views import center_view
from pipeline.preemption import ProcessFailedError
from pipeline.skips import SkippedSteps, find_samples
from pipeline.training_engine import StepResult

GOOD = StepResult(torch.tensor(1.5), {}, applied=True)
BAD = StepResult(torch.tensor(float("nan")), {}, applied=False)


def order_of(shards: Path) -> ShuffledOrder:
    return ShuffledOrder([shard.samples for shard in Manifest.load(shards).shards], seed=5)


@pytest.fixture
def skips(tmp_path: Path, drawn_shards: Path) -> SkippedSteps:
    return SkippedSteps(3, tmp_path, Manifest.load(drawn_shards), order_of(drawn_shards))


def test_an_isolated_skip_is_said_once_with_its_step(
    skips: SkippedSteps, tmp_path: Path, make_batch: Callable[..., object], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for step, result in enumerate([GOOD, BAD, GOOD, GOOD], start=1):
            skips.watch(step, result, make_batch())
    assert caplog.messages == [
        "step 2 changed nothing: its loss or gradient is not finite (1 in a row of at most 3)",
    ]
    assert not list(tmp_path.iterdir())


def test_only_skips_in_a_row_end_the_run_and_leave_the_samples(
    skips: SkippedSteps, tmp_path: Path, make_batch: Callable[..., object]
) -> None:
    for step, result in enumerate([BAD, BAD, GOOD, BAD, BAD], start=1):
        skips.watch(step, result, make_batch(4, start=4 * step))
    sentence = r"engine\.max_skipped: .* in 3 steps in a row, the last of them step 6; .*bad_batch\.json lists"
    with pytest.raises(ProcessFailedError, match=sentence):
        skips.watch(6, BAD, make_batch(4, start=24))
    written = json.loads((tmp_path / "bad_batch.json").read_text())
    (rank,) = written["ranks"]
    assert (written["step"], rank["rank"], rank["loss"], rank["indices"]) == (6, 0, "nan", [24, 25, 26, 27])
    assert len(rank["samples"]) == 4


def test_the_samples_of_a_bad_batch_are_those_that_the_loader_read(drawn_shards: Path) -> None:
    manifest = Manifest.load(drawn_shards)
    # Labels tell samples apart: read from the tars by the names, they are those that the loader gave.
    loader = Loader(
        LoaderConfig(str(drawn_shards), threads=1),
        [center_view(32)],
        seed=5,
        batch_size=16,
        device=torch.device("cpu"),
    )
    try:
        # From the first epoch into the second.
        batches = list(loader.batches(start=manifest.samples - 16, stop=manifest.samples + 16))
    finally:
        loader.close()
    for batch in batches:
        assert batch.labels is not None
        named = find_samples(manifest, order_of(drawn_shards), batch.index)
        assert len(set(named)) == 16
        assert [label_of(drawn_shards, name) for name in named] == batch.labels.tolist()


def label_of(shards: Path, name: str) -> int:
    shard, _, number = name.split()
    with tarfile.open(shards / shard) as tar:
        labels = [member for member in tar if member.name.endswith(".cls")]
        content = tar.extractfile(labels[int(number) - 1])
        assert content is not None
        return int(content.read())


def test_what_an_earlier_life_left_is_deleted_at_the_start(tmp_path: Path, drawn_shards: Path) -> None:
    (tmp_path / "bad_batch.json").write_text("{}")
    SkippedSteps(3, tmp_path, Manifest.load(drawn_shards), order_of(drawn_shards))
    assert not list(tmp_path.iterdir())


ON_TWO = """
    from pathlib import Path
    from types import SimpleNamespace
    import torch
    from data.manifest import Manifest
    from data.order import ShuffledOrder
    from pipeline import distributed
    from pipeline.training_engine import StepResult
    from pipeline.preemption import ProcessFailedError
    from pipeline.skips import SkippedSteps

    world = distributed.start()
    loss = torch.tensor([1.5, float("inf")][world.rank])
    batch = SimpleNamespace(index=10 * world.rank + torch.arange(3))
    manifest = Manifest.load(Path({shards!r}))
    order = ShuffledOrder([shard.samples for shard in manifest.shards], seed=5)
    skips = SkippedSteps(1, Path({folder!r}), manifest, order)
    try:
        skips.watch(7, StepResult(loss, {{}}, applied=False), batch)
    except (ProcessFailedError, SystemExit) as end:
        print(type(end).__name__)
    distributed.stop()
    """


def test_the_main_process_speaks_for_all_and_lists_the_samples_of_each(
    run_ranks: Callable[..., list[str]], tmp_path: Path, drawn_shards: Path
) -> None:
    said = run_ranks(ON_TWO.format(folder=str(tmp_path), shards=str(drawn_shards)), 2)
    assert [each.strip().splitlines()[-1] for each in said] == ["ProcessFailedError", "SystemExit"]
    ranks = json.loads((tmp_path / "bad_batch.json").read_text())["ranks"]
    assert [(rank["loss"], rank["indices"]) for rank in ranks] == [(1.5, [0, 1, 2]), ("inf", [10, 11, 12])]
