import gzip
import hashlib
import io
import shutil
import tarfile
from pathlib import Path

import pytest
import webdataset

from data.manifest import MANIFEST_NAME, SCHEMA_VERSION, Manifest, Shard
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
        ("a/1.*", "a sample without an image (jpg, jpeg, jpe, jfif, webp, png)"),
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


def write_set_of_ours(folder: Path, samples: list[dict], classes: tuple[str, ...]) -> None:
    """Write one shard and a manifest that names it."""
    write_shard(folder / "a.tar", samples)
    content = (folder / "a.tar").read_bytes()
    shard = Shard("a.tar", len(samples), len(content), hashlib.sha256(content).hexdigest(), "0" * 64)
    counts = (len(samples), len(content), 1, 1, {}, 0, "")
    Manifest(SCHEMA_VERSION, classes, *counts, (shard,), source="", options={}).write(folder)


@pytest.mark.parametrize("facts", [b"{", b"[]", b'{"path": 3}', b'{"path": "\\ud800"}', b"\xff", b"[" * 100_000])
def test_unreadable_facts_leave_the_name_of_the_sample(tmp_path, facts):
    write_set_of_ours(tmp_path, [{"__key__": "0", "jpg": b"a", "cls": b"0", "json": facts}], ("disc",))
    assert named(scan(tmp_path)) == [("a/0.jpg", "disc")]


def test_facts_name_the_image(tmp_path):
    sample = {"__key__": "0", "jpg": b"a", "cls": b"0", "json": b'{"path": "d/q.jpg"}'}
    write_set_of_ours(tmp_path, [sample], ("disc",))
    assert named(scan(tmp_path)) == [("d/q.jpg", "disc")]


# One kind or the other


@pytest.mark.parametrize("name", ["food-101.tar", "3.tar", "train-000017.tar"])
def test_class_folders_in_a_tar_count_whatever_its_name(tmp_path, name):
    write_members(tmp_path / name, ["a/1.jpg", "b/2.jpg"])
    assert named(scan(tmp_path / name)) == [("a/1.jpg", "a"), ("b/2.jpg", "b")]
    (tmp_path / "in").mkdir()
    (tmp_path / name).rename(tmp_path / "in" / name)
    if name == "food-101.tar":
        assert [label for _, label in named(scan(tmp_path / "in"))] == ["a", "b"]


@pytest.mark.parametrize("names", [("class_0", "class_1"), ("0", "1"), ("00000", "00007"), ("a-00000", "b-00001")])
def test_numbered_tars_of_images_only_are_refused_unless_named_as_shards(tmp_path, names):
    for name in names:
        write_members(tmp_path / f"{name}.tar", ["1.jpg"])
    with pytest.raises(ValueError, match=f"holds {names[0]}.tar, which may be a class or a part of .*; put"):
        scan(tmp_path)
    (tmp_path / "list").write_text(names[1])
    assert scan(tmp_path, classes=str(tmp_path / "list")).classes == (names[1],)
    (tmp_path / "list").unlink()
    for name in names:
        write_members(tmp_path / f"{name}.tar", [f"{name}/1.jpg"])
    assert sorted(scan(tmp_path).classes) == list(names)


def test_numbered_tars_of_class_folders_are_refused(tmp_path):
    for number in range(2):
        write_members(tmp_path / f"train-{number:06d}.tar", [f"a/{number}.jpg", f"b/{number}.jpg"])
    with pytest.raises(ValueError, match="may be a class or a part"):
        scan(tmp_path)
    (tmp_path.parent / "labels.csv").write_text("".join(f"{n},{n}\n" for n in range(2)))
    assert scan(tmp_path, labels=str(tmp_path.parent / "labels.csv")).classes == ("0", "1")


def test_an_empty_first_tar_says_nothing(tmp_path):
    write_members(tmp_path / "0.tar", [])
    write_shard(tmp_path / "1.tar", [{"__key__": "0", "jpg": b"a", "cls": b"7"}])
    assert named(scan(tmp_path)) == [("1/0.jpg", "7")]


def test_compressed_shards_are_refused_with_the_remedy(tmp_path):
    (tmp_path / "train-000000.tar.gz").write_bytes(gzip.compress(b"x"))
    with pytest.raises(ValueError, match=r"train-000000\.tar\.gz is compressed.*\(gunzip\)"):
        scan(tmp_path)
    write_members(tmp_path / "train-000001.tar", ["1.jpg"])
    with pytest.raises(ValueError, match=r"train-000000\.tar\.gz is compressed.*\(gunzip\)"):
        scan(tmp_path)


# Nothing disappears


@pytest.mark.parametrize("adjacent", [True, False])
def test_keys_that_occur_twice_are_rejected(tmp_path, adjacent):
    keys = [str(number) for number in range(10)]
    order = [key for key in keys for _ in range(2)] if adjacent else keys * 2
    write_members(tmp_path / "a.tar", [f"{key}.{extension}" for key in order for extension in ("jpg", "cls")])
    source = scan(tmp_path / "a.tar")
    assert len(source) == 10
    assert source.rejected == [(f"a/{key}.jpg", "a duplicate: a later one of its name counts") for key in keys]
    assert all(image.offset > 512 for image in source)  # the last one counts


def test_what_of_a_sample_does_not_come_along_is_counted(tmp_path):
    sample = {"jpg": b"a", "seg.png": b"b", "txt": b"c", "json": b"{}", "cls": b"1"}
    write_shard(tmp_path / "a.tar", [{"__key__": key, **sample} for key in "01"])
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("._0.jpg"))
    (tmp_path / "manifest.json").write_text('{"files": []}')  # of whoever wrote the set
    source = scan(tmp_path)
    assert len(source) == 2
    assert source.ignored == {".png": 2, ".txt": 2, ".json": 3, "hidden": 1}


def test_hidden_members_split_no_sample(tmp_path):
    write_members(tmp_path / "a.tar", ["0.jpg", "._0.cls", "0.cls"])
    assert named(scan(tmp_path / "a.tar")) == [("a/0.jpg", "0.cls")]


def test_samples_without_an_image_count_under_a_list_of_classes(tmp_path):
    samples = [
        {"__key__": "0", "jpg": b"a", "cls": b"cat"},
        {"__key__": "1", "txt": b"", "cls": b"cat"},
        {"__key__": "2", "txt": b"", "cls": b"dog"},
        {"__key__": "3", "txt": b""},
    ]
    write_shard(tmp_path / "a.tar", samples)
    (tmp_path / "list").write_text("cat\n")
    source = scan(tmp_path / "a.tar", classes=str(tmp_path / "list"))
    assert [path for path, _ in source.rejected] == ["a/1.*", "a/3.*"]
    assert source.ignored["images of other classes"] == 1


# A set of ours is whole or refused


def flip_a_byte(tar: Path) -> None:
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda s: (s / "train-000003.tar").unlink(), r"train-000003\.tar is missing; copy it again"),
        (lambda s: (s / "train-000003.tar").rename(s / "x.tar"), r"train-000003\.tar is missing"),
        (lambda s: shutil.copy(s / "train-000003.tar", s / "x.tar"), r"x\.tar is not in its manifest\.json"),
        (
            lambda s: (s / "train-000003.tar").write_bytes(b""),
            r"train-000003\.tar has 0 bytes, manifest\.json says \d+",
        ),
        (lambda s: flip_a_byte(s / "train-000003.tar"), r"the bytes of train-000003\.tar are not those"),
        (lambda s: flip_a_byte(s / "manifest.json"), r"manifest\.json"),
        (lambda s: (s / "manifest.json").rename(s / ".unfinished"), "is an unfinished set of shards; finish it"),
    ],
)
def test_a_set_of_ours_that_is_not_whole_is_refused(drawn_shards, tmp_path, damage, match):
    shutil.copytree(drawn_shards, tmp_path / "set")
    assert len(scan(tmp_path / "set")) == 48
    damage(tmp_path / "set")
    with pytest.raises(ValueError, match=match):
        scan(tmp_path / "set")


def test_a_set_of_ours_without_any_tar_is_refused(drawn_shards, tmp_path):
    shutil.copytree(drawn_shards, tmp_path / "set", ignore=shutil.ignore_patterns("*.tar"))
    with pytest.raises(ValueError, match=r"train-000000\.tar is missing"):
        scan(tmp_path / "set")


def test_what_is_beside_the_tars_of_our_set_is_ours(drawn_shards, tmp_path):
    shutil.copytree(drawn_shards, tmp_path / "set")
    (tmp_path / "set" / "README.txt").write_text("a word")
    assert scan(drawn_shards).ignored == {}
    assert scan(tmp_path / "set").ignored == {".txt": 1}


@pytest.mark.parametrize("content", ["{}", "[1]", '{"shards": ["a.tar"]}'])
def test_a_manifest_of_others_is_no_obstacle(tmp_path, content):
    write_shard(tmp_path / "a.tar", [{"__key__": "0", "jpg": b"a", "cls": b"1"}])
    (tmp_path / MANIFEST_NAME).write_text(content)
    assert named(scan(tmp_path)) == [("a/0.jpg", "1")]
