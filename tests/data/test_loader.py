"""Batches are a pure function of (seed, place): not of ranks, batch size, threads or where a run starts."""

import io
import re
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data.loader import Batch, Loader, LoaderConfig
from data.manifest import Manifest, SampleIndex
from data.order import FixedOrder, ShuffledOrder, SubsetOrder, held_out
from data.reader import Reader, Sample
from data.shard import ShardConfig, run
from data.views import ViewSpec, center_view

CPU = torch.device("cpu")
SPECS = [ViewSpec(32, blur=1.0), ViewSpec(24, blur=0.1, solarize=0.2)]


@pytest.fixture
def make(drawn_shards: Path) -> Iterator[Any]:
    """Return a function that opens a loader, and close all of them in the end."""
    opened: list[Loader] = []

    def open_loader(
        views: Any = SPECS, order: Any = None, threads: int = 1, shards: Any = drawn_shards, **fields: Any
    ) -> Loader:
        settings = {key: fields.pop(key) for key in list(fields) if key in LoaderConfig.__dataclass_fields__}
        device = {"device": CPU}
        config = LoaderConfig(str(shards), threads=threads, **settings)
        opened.append(Loader(config, views, order, **{"seed": 5, "batch_size": 32} | device | fields))
        return opened[-1]

    yield open_loader
    for loader in opened:
        loader.close()


def joined(batches: list[Batch]) -> tuple[list[int], list[Tensor], list[int]]:
    """Return indices, views and labels of batches in a row."""
    views = [torch.cat([batch.views[k] for batch in batches]) for k in range(len(batches[0].views))]
    labels = [int(label) for batch in batches if batch.labels is not None for label in batch.labels]
    return [int(place) for batch in batches for place in batch.index], views, labels


def in_global_order(ranks: list[list[Batch]]) -> list[Batch]:
    """Deal the ranks' shares of each step out as a deck of cards."""

    def dealt(tensors: Any) -> Tensor:
        return torch.stack(list(tensors), dim=1).flatten(0, 1)

    return [
        Batch(
            tuple(dealt(views) for views in zip(*(batch.views for batch in step), strict=True)),
            dealt(batch.labels for batch in step),
            dealt(batch.index for batch in step),
        )
        for step in zip(*ranks, strict=True)
    ]


def test_ranks_batch_size_threads_and_start_do_not_change_a_bit(make: Any) -> None:
    one = joined(list(islice(make().batches(), 3)))
    four = [make(rank=rank, world_size=4, threads=2) for rank in range(4)]
    assert_same(one, joined(in_global_order([list(islice(loader.batches(), 3)) for loader in four])))
    # A restart in the middle, across the end of the epoch at 48, with two ranks and another batch size.
    two = [make(rank=rank, world_size=2, batch_size=12) for rank in range(2)]
    restarted = joined(in_global_order([list(islice(loader.batches(start=37), 4)) for loader in two]))
    assert_same(tuple(part(37, 85) for part in cutters(one)), restarted)


def test_colors_are_changed_as_the_config_says(make: Any) -> None:
    fused, exact = (next(make(color=color).batches()).views[0] for color in ("fused", "exact"))
    assert not torch.equal(fused, exact)
    assert (fused - exact).abs().mean() < 0.2


def cutters(run: tuple[list[int], list[Tensor], list[int]]) -> list[Any]:
    index, views, labels = run
    return [
        lambda a, b: index[a:b],
        lambda a, b: [view[a:b] for view in views],
        lambda a, b: labels[a:b],
    ]


def assert_same(ours: Any, theirs: Any) -> None:
    assert ours[0] == theirs[0]
    assert ours[2] == theirs[2]
    assert len(ours[1]) == len(theirs[1])
    assert all(torch.equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True))


def test_views_differ_between_epochs_seeds_and_views(make: Any) -> None:
    same = [ViewSpec(32)] * 2
    order = FixedOrder(np.arange(8))
    first = next(make(same, order).batches()).views
    assert not torch.equal(*first)
    assert not torch.equal(first[0], next(make(same, order, seed=6).batches()).views[0])
    index, views, _ = joined(list(islice(make([ViewSpec(32)]).batches(), 3)))
    sample = ShuffledOrder([10, 10, 10, 10, 8], 5).place(np.array(index))[1].tolist()
    again = sample.index(sample[0], 48)
    assert not torch.equal(views[0][0], views[0][again])


def test_labels_and_indices_are_those_of_the_samples(make: Any, drawn_shards: Path) -> None:
    loader = make(batch_size=20)
    index, _, labels = joined(list(islice(loader.batches(start=7), 6)))
    assert index == list(range(7, 127))
    set_index = SampleIndex.load(drawn_shards, Manifest.load(drawn_shards))
    true = [sample.label for sample in Reader(set_index).read(range(48))]
    ids = ShuffledOrder(set_index.counts, 5).place(np.array(index))[1]
    assert labels == [true[k] for k in ids]
    assert loader.num_samples == 48
    assert loader.classes == Manifest.load(drawn_shards).classes
    assert len(set(labels)) == 4


def test_pixels_are_those_of_the_sample(make: Any, drawn_shards: Path) -> None:
    """The whole drawn image at its own size: what comes out is what was packed, normalized."""
    view = ViewSpec(48, crop="center", center_fraction=1.0, flip=0, jitter_probability=0, grayscale=0)
    batch = next(make([view], FixedOrder([31, 4])).batches())
    reader = Reader(SampleIndex.load(drawn_shards, Manifest.load(drawn_shards)))
    for pixels, sample in zip(batch.views[0], reader.read([31, 4]), strict=True):
        packed = torch.from_numpy(np.array(Image.open(io.BytesIO(sample.image.tobytes())).convert("RGB")))
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        expected = (packed / 255 - mean) / std
        assert torch.allclose(pixels.permute(1, 2, 0), expected, atol=1e-5)


def test_every_epoch_has_every_sample_once(make: Any) -> None:
    batches = list(islice(make([center_view(16)], batch_size=100).batches(), 2))
    _, (views,), _ = joined(batches)
    epochs = [view.flatten(1).sum(1).sort().values for view in views[: 4 * 48].split(48)]
    assert len(epochs) == 4
    assert all(torch.equal(epochs[0], epoch) for epoch in epochs[1:])


@pytest.mark.parametrize(("stop", "sizes"), [(48, [20, 20, 8]), (40, [20, 20]), (3, [3]), (0, [])])
def test_stop_is_exact_with_one_process(make: Any, stop: int, sizes: list[int]) -> None:
    batches = list(make(batch_size=20).batches(stop=stop))
    assert [len(batch.index) for batch in batches] == sizes
    assert [len(batch.views[0]) for batch in batches] == sizes
    assert [int(k) for batch in batches for k in batch.index] == list(range(stop))


def test_stop_is_shared_between_ranks_and_an_empty_rank_ends(make: Any) -> None:
    places = [
        [batch.index.tolist() for batch in make(rank=rank, world_size=4, batch_size=8).batches(stop=11)]
        for rank in range(4)
    ]
    assert [rank[0] for rank in places] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert [rank[1:] for rank in places] == [[[8]], [[9]], [[10]], []]


def test_a_fixed_order_ends_by_itself_and_runs_again(make: Any) -> None:
    loader = make([center_view(16)], FixedOrder([3, 3, 40]), batch_size=2)
    for _ in range(2):
        _, (views,), labels = joined(list(loader.batches()))
        assert len(views) == 3
        assert torch.equal(views[0], views[1])
        assert labels[0] == labels[1]


def fingerprints(loader: Loader, stop: int | None = None) -> list[float]:
    """Return a number for each image, by which it is known, since the views are always the same."""
    _, (views,), _ = joined(list(loader.batches(stop=stop)))
    return views.flatten(1).double().sum(1).tolist()


def test_what_is_held_out_is_never_seen(make: Any, drawn_shards: Path) -> None:
    learned, held = held_out(48, 0.3)
    known, unknown = (fingerprints(make([center_view(16)], FixedOrder(ids))) for ids in (learned, held))
    assert len({*known, *unknown}) == 48
    loader = make([center_view(16)], held_out=0.3, batch_size=20)
    seen = fingerprints(loader, stop=2 * 34)
    assert [sorted(epoch) for epoch in (seen[:34], seen[34:])] == [sorted(known)] * 2
    whole = ShuffledOrder(SampleIndex.load(drawn_shards, Manifest.load(drawn_shards)).counts, 5)
    assert len(loader.order) == 34
    for ours, theirs in zip(
        loader.order.place(np.arange(99)), SubsetOrder(whole, learned).place(np.arange(99)), strict=True
    ):
        assert (ours == theirs).all()
    sample = loader.order.place(np.arange(2 * 34))[1].tolist()
    assert seen == [known[learned.tolist().index(each)] for each in sample]


def test_ranks_and_a_restart_hold_the_same_samples_out(make: Any) -> None:
    one = joined(list(make(held_out=0.3, batch_size=20).batches(stop=80)))
    two = [list(make(held_out=0.3, batch_size=20, rank=rank, world_size=2).batches(20, 80)) for rank in range(2)]
    assert_same(tuple(part(20, 80) for part in cutters(one)), joined(in_global_order(two)))


def test_the_largest_share_leaves_one_sample(make: Any) -> None:
    assert len(make(held_out=float(np.nextafter(1, 0))).order) == 1


def test_a_given_order_holds_nothing_out(make: Any) -> None:
    order = FixedOrder([3, 4])
    assert make(order=order, held_out=0.9).order is order


def test_an_unlabeled_set_has_no_labels(make: Any, drawn_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "flat"
    source.mkdir()
    for k, image in enumerate(sorted(drawn_folder.glob("*/*"))[:6]):
        shutil.copy(image, source / f"{k}{image.suffix}")
    run(ShardConfig(str(source), str(tmp_path / "shards"), workers=1))
    loader = make(shards=tmp_path / "shards", batch_size=4)
    assert loader.classes == ()
    assert next(loader.batches()).labels is None


def test_waiting_is_counted_and_only_waiting(make: Any) -> None:
    loader = make()
    assert loader.wait_seconds == 0
    batches = loader.batches()
    next(batches)
    waited = loader.wait_seconds
    assert waited > 0
    torch.randn(1500, 1500).matmul(torch.randn(1500, 1500))
    assert loader.wait_seconds == waited
    next(batches)
    assert loader.wait_seconds > waited


@pytest.fixture
def damaged_shards(drawn_shards: Path, tmp_path: Path) -> Path:
    """Return a copy in which sample 17 has a sound frame header but a scan that no decoder takes."""
    copy = Path(shutil.copytree(drawn_shards, tmp_path / "damaged"))
    index = SampleIndex.load(copy, Manifest.load(copy))
    image = Reader(index).read([17])[0].image.tobytes()
    with index.paths[index.shard[17]].open("r+b") as tar:
        tar.seek(int(index.offset[17]) + image.rfind(b"\xff\xda") + 4)
        tar.write(b"\x09")
    return copy


@pytest.mark.usefixtures("unsealed")
def test_an_undecodable_sample_is_replaced_by_the_next_good_one(
    make: Any, drawn_shards: Path, damaged_shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    order = FixedOrder(np.arange(40))
    sound = joined(list(make(order=order, batch_size=4).batches()))
    loader = make(order=order, shards=damaged_shards, batch_size=4)
    index, views, labels = joined(list(loader.batches()))
    assert index == sound[0] == list(range(40))
    assert loader.bad_samples == 1
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("decoding failed, looking for the image: ")
    assert re.search(
        r"train-000001\.tar: sample \w+\.jpg is not .*\(it does not decode\).*\(1 of at most 100\)", caplog.messages[1]
    )
    for ours, theirs in zip(views, sound[1], strict=True):
        differing = [k for k in range(40) if not torch.equal(ours[k], theirs[k])]
        assert differing == [17]
    assert labels[17] == sound[2][18]
    # The next sample, in the crop and the colors of the place's own.
    assert not torch.equal(views[0][17], views[0][18])


@pytest.mark.usefixtures("unsealed")
def test_many_broken_samples_are_all_replaced_on_every_rank(make: Any, drawn_shards: Path, tmp_path: Path) -> None:
    """Half of the first two shards: not JPEGs, cut scans, labels out of range. Ranks and restarts agree on the rest."""
    copy = Path(shutil.copytree(drawn_shards, tmp_path / "damaged"))
    index = SampleIndex.load(copy, Manifest.load(copy))
    for sample in range(0, 20, 2):
        damage(index, sample, kind=sample // 2 % 3)
    one = make(shards=copy, batch_size=24)
    whole = joined(list(one.batches(stop=96)))
    assert one.bad_samples == 10
    assert whole[0] == list(range(96))
    ids = ShuffledOrder(index.counts, 5).place(np.arange(96))[1]
    sound = joined(list(make(batch_size=24).batches(stop=96)))
    differing = {k for k in range(96) if not torch.equal(whole[1][0][k], sound[1][0][k])}
    assert differing == {k for k in range(96) if ids[k] in range(0, 20, 2)}
    later = ShuffledOrder(index.counts, 5).place(np.arange(24 * 40))[1].reshape(-1, 24)
    true = [sample.label for sample in Reader(SampleIndex.load(drawn_shards, index.manifest)).read(range(48))]
    for place in range(96):
        candidates = later[place // 24 :, place % 24]
        assert whole[2][place] == true[next(k for k in candidates if k not in range(0, 20, 2))]
    ranks = [make(shards=copy, batch_size=24, rank=rank, world_size=2) for rank in range(2)]
    assert_same(whole, joined(in_global_order([list(loader.batches(stop=96)) for loader in ranks])))
    resumed = joined(list(make(shards=copy, batch_size=24).batches(start=48, stop=96)))
    assert_same(tuple(part(48, 96) for part in cutters(whole)), resumed)


def damage(index: SampleIndex, sample: int, kind: int) -> None:
    (image,) = Reader(index).read([sample])
    assert isinstance(image, Sample)
    content, offset = image.image.tobytes(), int(index.offset[sample])
    at, junk = {
        0: (offset, b"<html>"),
        1: (offset + content.rfind(b"\xff\xda") + 4, b"\x09"),
        2: (int(index.label_offset[sample]), b"9"),
    }[kind]
    with index.paths[index.shard[sample]].open("r+b") as tar:
        tar.seek(at)
        tar.write(junk)


@pytest.mark.parametrize("components", [0, 2, 5, 0xDF])
@pytest.mark.usefixtures("unsealed")
def test_a_strange_number_of_components_crashes_nobody(
    make: Any, drawn_shards: Path, tmp_path: Path, components: int
) -> None:
    """DALI's threads have died of such a header in the middle of a batch."""
    copy = Path(shutil.copytree(drawn_shards, tmp_path / "damaged"))
    index = SampleIndex.load(copy, Manifest.load(copy))
    with index.paths[0].open("r+b") as tar:
        frame = index.paths[0].read_bytes().index(b"\xff\xc0", int(index.offset[2]))
        tar.seek(frame + 9)
        tar.write(bytes([components]))
    loader = make(shards=copy, threads=2, batch_size=48)
    assert joined(list(loader.batches(stop=48)))[0] == list(range(48))
    assert loader.bad_samples == 1


@pytest.mark.usefixtures("unsealed")
def test_one_broken_sample_too_many_ends_the_run_with_its_name(make: Any, damaged_shards: Path) -> None:
    loader = make(order=FixedOrder(np.arange(40)), shards=damaged_shards, batch_size=4, max_bad_samples=0)
    batches = loader.batches()
    assert [int(next(batches).index[0]) for _ in range(4)] == [0, 4, 8, 12]
    with pytest.raises(ValueError, match=r"data.max_bad_samples: 1 samples are broken, 0 may be.*train-000001\.tar"):
        next(batches)


def test_a_set_without_one_good_sample_ends(make: Any, drawn_shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(drawn_shards, tmp_path / "damaged"))
    index = SampleIndex.load(copy, Manifest.load(copy))
    for sample in range(48):
        damage(index, sample, kind=0)
    with pytest.raises(ValueError, match="1000 samples in a row are broken"):
        next(make(shards=copy).batches())


def test_an_error_that_no_image_explains_is_raised_as_it_is(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("data.dali.ViewPipeline.__next__", fail)
    monkeypatch.setattr("data.loader.find_undecodable", lambda *_: [])
    with pytest.raises(RuntimeError, match="out of memory"):
        next(make().batches())


def test_staged_copies_change_no_bit_and_go_in_the_end(make: Any, drawn_shards: Path, tmp_path: Path) -> None:
    sound = joined(list(make().batches(stop=200)))
    loader = make(staging=str(tmp_path / "local"), staging_gigabytes=1e-4)
    assert_same(sound, joined(list(loader.batches(stop=200))))
    assert loader._stage._copies
    assert loader._stage._place == 192  # of the last batch's first sample
    loader.close()
    assert list((tmp_path / "local").iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"device": "tpu"}, "data.device: must be auto, cpu or gpu, not 'tpu'"),
        ({"color": "sepia"}, "data.color: must be fused or exact, not 'sepia'"),
        ({"threads": -1}, "data.threads: must be at least 0, not -1"),
        ({"prefetch": -1}, "data.prefetch: must be at least 0, not -1"),
        ({"hardware_share": 2}, "data.hardware_share: must be 0 to 1, or -1 to measure, not 2"),
        ({"max_bad_samples": -1}, "data.max_bad_samples: must be at least 0, not -1"),
        ({"staging_gigabytes": 0}, "data.staging_gigabytes: must be above 0, not 0"),
        ({"held_out": 1}, r"data.held_out: must be a share in \[0, 1\), not 1; 0 holds nothing out\.$"),
        ({"held_out": -0.1}, r"data.held_out: must be a share in \[0, 1\), not -0\.1; 0 holds"),
        ({"held_out": float("nan")}, r"data.held_out: must be a share in \[0, 1\), not nan; 0 holds"),
        ({"held_out": 0.1, "staging": "/tmp"}, r"data.staging: must be empty with data.held_out, which leaves .*\.$"),
    ],
)
def test_a_bad_setting_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoaderConfig(**fields)


def test_missing_shards_are_named(make: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.shards: no directory .*/nowhere; give"):
        make(shards=tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        make(shards=tmp_path)
    with pytest.raises(ValueError, match=r"data.shards: missing; give"):
        make(shards="")


def test_a_batch_that_ranks_cannot_share_is_refused(make: Any) -> None:
    with pytest.raises(
        ValueError,
        match=r"the number of processes, 4; start 2 or 5 of them, or a new run with batch_size=8\.",
    ):
        make(batch_size=10, world_size=4)


def test_gpu_views_need_a_gpu(drawn_shards: Path) -> None:
    config = LoaderConfig(str(drawn_shards), device="gpu")
    with pytest.raises(ValueError, match=r"data.device: gpu needs a GPU, but this process trains on cpu"):
        Loader(config, SPECS, seed=0, batch_size=4, device=CPU)
