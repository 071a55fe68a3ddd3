import io
import tarfile
from pathlib import Path

import pytest
import webdataset

from data.manifest import MANIFEST_NAME, Manifest
from data.shard import ShardConfig, run
from data.sources import scan
from data.sources.extents import ExtentReader


def write_shard(path: Path, samples: list[dict]) -> None:
    """Write samples as the webdataset library does: label and facts beside the image."""
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        for sample in samples:
            writer.write(sample)


def write_members(path: Path, names: list[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))


def named(source):
    return [(image.path, source.classes[image.label] if image.label >= 0 else None) for image in sorted(source)]


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != MANIFEST_NAME}


def test_shards_of_others(tmp_path):
    write_shard(
        tmp_path / "train-000000.tar",
        [
            {"__key__": "x/0", "jpg": b"photograph", "png": b"mask", "cls": b"10", "json": b"{}"},
            {"__key__": "x/1", "jpeg": b"second", "cls": b"2\n"},
        ],
    )
    write_shard(tmp_path / "train-000001.tar", [{"__key__": "y", "webp": b"third", "cls": b"10"}])
    source = scan(tmp_path)
    assert source.classes == ("2", "10")  # by value, so that without gaps ids are the numbers
    assert named(source) == [
        ("train-000000/x/0.jpg", "10"),
        ("train-000000/x/1.jpeg", "2"),
        ("train-000001/y.webp", "10"),
    ]
    with ExtentReader() as reader:
        assert [reader.read(image) for image in sorted(source)] == [b"photograph", b"second", b"third"]
    assert named(scan(tmp_path / "train-000001.tar")) == [("train-000001/y.webp", "10")]


def test_samples_without_an_image_or_a_label_are_told(tmp_path):
    sample = {"__key__": "0", "jpg": b"a", "cls": b"1"}
    write_shard(tmp_path / "a.tar", [sample, {"__key__": "1", "txt": b"a"}, {"__key__": "2", "jpg": b"b", "cls": b" "}])
    source = scan(tmp_path)
    assert named(source) == [("a/0.jpg", "1")]
    assert source.rejected == [
        ("a/1.*", "a sample without an image (jpg, jpeg, webp, png)"),
        ("a/2.jpg", "its label is empty"),
    ]
    write_shard(tmp_path / "b.tar", [{"__key__": "0", "jpg": b"a"}])
    with pytest.raises(ValueError, match=r"images with a class and images without \(b/0\.jpg\)"):
        scan(tmp_path)


def test_tars_of_images_only_are_shards_if_they_are_numbered(tmp_path):
    for name in ("shards/train-000000.tar", "classes/n01440764.tar"):
        (tmp_path / name).parent.mkdir()
        write_members(tmp_path / name, ["1.jpg", "2.jpg"])
    assert named(scan(tmp_path / "shards")) == [("train-000000/1.jpg", None), ("train-000000/2.jpg", None)]
    assert named(scan(tmp_path / "classes")) == [("n01440764/1.jpg", "n01440764"), ("n01440764/2.jpg", "n01440764")]


def test_facts_beside_images_in_class_folders_make_no_shard_of_a_tar(tmp_path):
    write_members(tmp_path / "x.tar", ["a/1.jpg", "a/1.json", "b/2.jpg", "b/2.json"])
    assert named(scan(tmp_path / "x.tar")) == [("a/1.jpg", "a"), ("b/2.jpg", "b")]


def test_a_set_of_ours_gives_what_its_source_gives(drawn_folder, drawn_shards, tmp_path):
    ours, original = scan(drawn_shards), scan(drawn_folder)
    assert named(ours) == named(original)
    assert ours.classes == original.classes == Manifest.load(drawn_shards).classes
    options = {"samples_per_shard": 7, "seed": 3, "workers": 1}
    run(ShardConfig(str(drawn_folder), str(tmp_path / "a"), **options))
    run(ShardConfig(str(drawn_shards), str(tmp_path / "b"), **options))
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_classes_keep_their_ids_even_where_names_would_sort_otherwise(drawn_folder, drawn_shards, tmp_path):
    source = tmp_path / "shards"
    run(ShardConfig(str(drawn_folder), str(source), samples_per_shard=48, workers=1))
    manifest = Manifest.load(source)
    manifest.write(source)
    renamed = Manifest(**{**vars(manifest), "classes": ("z", "y", "x", "unused", "w")[:4]})
    renamed.write(source)
    again = scan(source)
    assert again.classes == ("z", "y", "x", "unused")
    assert {image.path.split("/")[0]: image.label for image in again} == {
        name: position for position, name in enumerate(manifest.classes)
    }


def test_labels_that_a_set_of_ours_cannot_have_are_told(drawn_folder, tmp_path):
    run(ShardConfig(str(drawn_folder), str(tmp_path / "s"), samples_per_shard=48, workers=1))
    manifest = Manifest.load(tmp_path / "s")
    Manifest(**{**vars(manifest), "classes": manifest.classes[:3]}).write(tmp_path / "s")
    source = scan(tmp_path / "s")
    assert len(source) == 36
    assert {reason for _, reason in source.rejected} == {"its label '3' is not one of 3 classes"}


def test_only_wanted_classes_of_a_set(drawn_shards, tmp_path):
    (tmp_path / "list").write_text("ring\ndisc\n")
    source = scan(drawn_shards, classes=str(tmp_path / "list"))
    assert source.classes == ("disc", "ring")
    assert len(source) == 24


@pytest.mark.parametrize("facts", [b"{", b"[]", b'{"path": 3}', b'{"path": "\\ud800"}', b"\xff", b"[" * 100_000])
def test_unreadable_facts_leave_the_name_of_the_sample(drawn_shards, tmp_path, facts):
    write_shard(tmp_path / "a.tar", [{"__key__": "0", "jpg": b"a", "cls": b"0", "json": facts}])
    (tmp_path / MANIFEST_NAME).write_bytes((drawn_shards / MANIFEST_NAME).read_bytes())
    assert named(scan(tmp_path)) == [("a/0.jpg", "disc")]


def test_facts_name_the_image(drawn_shards, tmp_path):
    write_shard(tmp_path / "a.tar", [{"__key__": "0", "jpg": b"a", "cls": b"0", "json": b'{"path": "d/q.jpg"}'}])
    (tmp_path / MANIFEST_NAME).write_bytes((drawn_shards / MANIFEST_NAME).read_bytes())
    assert named(scan(tmp_path)) == [("d/q.jpg", "disc")]
