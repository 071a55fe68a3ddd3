import io
import os
import re
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.sources import scan
from data.sources import table as table_module
from data.sources.classes import read_class_list
from data.sources.entries import OWN_FILE, Found
from data.sources.extents import ExtentReader
from data.sources.table import Table

CONTENT = b"any bytes: a scan does not decode"


def write_tree(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(CONTENT + os.fsencode(name))
    return root


def write_tar(path: Path, names: list[str], **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            content = CONTENT + os.fsencode(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


CLASS_FOLDER = ["b/2.JPEG", "a/1.jpg", "a/more/3.png", "a/notes.txt", ".hidden/x.jpg", "a/._1.jpg"]
EXPECTED = [("a/1.jpg", "a"), ("a/more/3.png", "a"), ("b/2.JPEG", "b")]


def named(source):
    return [(image.path, source.classes[image.label] if image.label >= 0 else None) for image in sorted(source)]


def read(source) -> list[bytes]:
    with ExtentReader() as reader:
        return [reader.read(image) for image in sorted(source)]


def test_a_class_folder(tmp_path):
    source = scan(write_tree(tmp_path, CLASS_FOLDER))
    assert named(source) == EXPECTED
    assert source.classes == ("a", "b")
    assert read(source) == [CONTENT + path.encode() for path, _ in EXPECTED]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("prefix", ["", "./", "long" * 40 + "/train/"])
def test_a_tar_of_a_class_folder(tmp_path, form, prefix):
    if form == tarfile.USTAR_FORMAT:
        prefix = prefix.replace("long" * 40, "short")
    source = scan(write_tar(tmp_path / "x.tar", [prefix + name for name in CLASS_FOLDER[:4]], format=form))
    assert [label for _, label in named(source)] == ["a", "a", "b"]
    assert read(source)[0] == CONTENT + f"{prefix}a/1.jpg".encode()


def test_an_archive_of_class_archives_is_read_in_place(tmp_path):
    write_tar(tmp_path / "n02.tar", ["n02_1.JPEG"])
    write_tar(tmp_path / "n01.tar", ["n01_7.JPEG", "n01_3.JPEG"])
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "w") as tar:
        tar.add(tmp_path / "n02.tar", "n02.tar")
        tar.add(tmp_path / "n01.tar", "n01.tar")
    source = scan(tmp_path / "ILSVRC2012_img_train.tar")
    assert named(source) == [("n01/n01_3.JPEG", "n01"), ("n01/n01_7.JPEG", "n01"), ("n02/n02_1.JPEG", "n02")]
    assert {image.file for image in source} == {str(tmp_path / "ILSVRC2012_img_train.tar")}
    assert [content[len(CONTENT) :] for content in read(source)] == [
        b"n01_3.JPEG",
        b"n01_7.JPEG",
        b"n02_1.JPEG",
    ]


@pytest.mark.parametrize(
    ("names", "label"),
    [(["cats/1.jpg", "cats/2.jpg"], "cats"), (["train/cats/1.jpg", "train/cats/2.jpg"], "cats")],
)
def test_a_single_class_is_the_innermost_shared_folder(tmp_path, names, label):
    assert scan(write_tree(tmp_path, names)).classes == (label,)


def test_flat_sources_are_unlabelled(tmp_path):
    for source in (
        scan(write_tar(tmp_path / "val.tar", ["v_2.JPEG", "v_1.JPEG"])),
        scan(write_tree(tmp_path / "val", ["v_2.JPEG", "v_1.JPEG"])),
    ):
        assert named(source) == [("v_1.JPEG", None), ("v_2.JPEG", None)]
        assert source.classes == ()


def test_class_folders_may_be_links(tmp_path):
    write_tree(tmp_path / "all", ["a/1.jpg", "b/2.jpg"])
    (tmp_path / "subset").mkdir()
    (tmp_path / "subset" / "b").symlink_to(tmp_path / "all" / "b")
    (tmp_path / "subset" / "a").symlink_to(tmp_path / "all" / "a")
    assert named(scan(tmp_path / "subset")) == [("a/1.jpg", "a"), ("b/2.jpg", "b")]


def test_of_two_members_of_one_name_the_last_counts(tmp_path):
    write_tar(tmp_path / "x.tar", ["a/1.jpg", "b/1.jpg", "a/1.jpg"])
    source = scan(tmp_path / "x.tar")
    first, second = sorted(source)
    assert (first.path, second.path) == ("a/1.jpg", "b/1.jpg")
    assert first.offset > second.offset
    assert source.rejected == [("a/1.jpg", "a duplicate: a later one of its name counts")]


def test_the_fingerprint_follows_names_sizes_and_times(tmp_path):
    write_tree(tmp_path, ["a/1.jpg", "b/2.jpg"])
    first = scan(tmp_path).fingerprint
    assert scan(tmp_path).fingerprint == first
    os.utime(tmp_path / "a/1.jpg", (0, 0))
    second = scan(tmp_path).fingerprint
    (tmp_path / "b/2.jpg").rename(tmp_path / "b/3.jpg")
    assert len({first, second, scan(tmp_path).fingerprint}) == 3


def test_a_file_that_changes_after_the_scan_is_not_read(tmp_path):
    source = scan(write_tree(tmp_path, ["a/1.jpg"]))
    size = (tmp_path / "a/1.jpg").stat().st_size
    (tmp_path / "a/1.jpg").write_bytes(b"short")
    with pytest.raises(ValueError, match="changed while it was read"):
        read(source)
    (tmp_path / "a/1.jpg").write_bytes(bytes(size))
    os.utime(tmp_path / "a/1.jpg", (1, 1))
    with pytest.raises(ValueError, match="changed while it was read"):
        read(source)
    (tmp_path / "a/1.jpg").unlink()
    with pytest.raises(ValueError, match=r"cannot read a/1\.jpg"):
        read(source)


def refuse(path: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        scan(path)
    assert str(error.value).startswith("shard.source: ")
    assert str(error.value).endswith(".")


def test_missing_and_empty_sources_are_refused(tmp_path):
    refuse(tmp_path / "nowhere", "no such file or folder .*nowhere; give a class folder")
    refuse(write_tree(tmp_path / "texts", ["a/readme.txt"]), r"no image in .*texts \(ignored 1 \(\.txt 1\)\); give")
    refuse(write_tar(tmp_path / "texts.tar", ["a/readme.txt"]), "no image in .*; give a class folder")


def test_what_is_not_a_plain_whole_tar_is_refused(tmp_path):
    (tmp_path / "x.jpg").write_bytes(CONTENT)
    refuse(tmp_path / "x.jpg", "not a whole, uncompressed tar")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "x.jpg", "a/x.jpg")
    refuse(tmp_path / "x.tar.gz", r"x\.tar\.gz is compressed, .*\(gunzip\)")
    (tmp_path / "x.tar.gz").rename(tmp_path / "y.tar")
    refuse(tmp_path / "y.tar", r"y\.tar is compressed, .*\(gunzip, for gzip\)")
    whole = write_tar(tmp_path / "whole.tar", [f"a/{number}.jpg" for number in range(40)]).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: 512 * 31 + 100])
    refuse(tmp_path / "cut.tar", "not a whole, uncompressed tar")


def test_an_image_cut_off_at_the_end_of_a_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("a/1.jpg")
        info.size = 5000
        tar.addfile(info, io.BytesIO(bytes(5000)))
    (tmp_path / "x.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:3000])
    refuse(tmp_path / "x.tar", "not a whole, uncompressed tar")


def test_images_beside_class_folders_are_refused(tmp_path):
    refuse(write_tree(tmp_path, ["a/1.jpg", "stray.jpg"]), r"mixes class folders.*\(stray\.jpg\)")


def write_members(path: Path, members: list[tuple[str, bytes, bytes | str]]) -> Path:
    """Write members (name, type, content or link's target)."""
    with tarfile.open(path, "w") as tar:
        for name, kind, value in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if isinstance(value, bytes):
                info.size = len(value)
                tar.addfile(info, io.BytesIO(value))
            else:
                info.linkname = value
                tar.addfile(info)
    return path


REGULAR, HARD, SYMBOLIC, FIFO = tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE


def test_hard_links_inside_a_tar_are_the_files_they_name(tmp_path):
    members = [
        ("./a/1.jpg", REGULAR, b"first"),
        ("blobs/x", REGULAR, b"blob"),
        ("b/2.jpg", HARD, "a/1.jpg"),
        ("b/3.jpg", HARD, "./blobs/x"),
        ("b/4.jpg", HARD, "b/3.jpg"),
        ("b/5.jpg", HARD, "b/nowhere.jpg"),
        ("b/6.jpg", HARD, "a/s.jpg"),
        ("a/s.jpg", SYMBOLIC, "1.jpg"),
    ]
    write_members(tmp_path / "inner.tar", members)
    source = scan(tmp_path / "inner.tar")
    assert [path for path, _ in named(source)] == ["a/1.jpg", "b/2.jpg", "b/3.jpg", "b/4.jpg"]
    assert read(source) == [b"first", b"first", b"blob", b"blob"]
    assert [path for path, _ in source.rejected] == ["a/s.jpg", "b/5.jpg", "b/6.jpg"]
    with tarfile.open(tmp_path / "outer.tar", "w") as tar:
        tar.add(tmp_path / "inner.tar", "n01.tar")
    assert read(scan(tmp_path / "outer.tar")) == [b"first", b"first", b"blob", b"blob"]


def test_what_a_tar_must_not_make_us_read_is_rejected_with_its_reason(tmp_path):
    members = [
        ("a/1.jpg", REGULAR, b"good"),
        ("../a/2.jpg", REGULAR, b"bad"),
        ("/a/3.jpg", REGULAR, b"bad"),
        ("a/../../4.jpg", REGULAR, b"bad"),
        ("a/5.jpg", SYMBOLIC, "/etc/passwd"),
        ("b", SYMBOLIC, "/elsewhere/b"),
        ("a/6.jpg", FIFO, ""),
        ("a/notes.txt", SYMBOLIC, "x"),
        (".git", SYMBOLIC, "x"),
    ]
    source = scan(write_members(tmp_path / "x.tar", members))
    assert named(source) == [("a/1.jpg", "a")]
    leads_out, link = "its name leads out of the archive", "; pack what it points to (tar --dereference)"
    assert source.rejected == [
        ("../a/2.jpg", leads_out),
        ("/a/3.jpg", leads_out),
        ("a/../../4.jpg", leads_out),
        ("a/5.jpg", f"symbolic link to /etc/passwd{link}"),
        ("a/6.jpg", "not a regular file"),
        ("a/notes.txt", f"symbolic link to x{link}"),  # a class folder's name may have a dot, too
        ("b", f"symbolic link to /elsewhere/b{link}"),
    ]


def test_a_sparse_member_is_rejected(tmp_path):
    (tmp_path / "a").mkdir()
    with (tmp_path / "a" / "1.jpg").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"end")
    (tmp_path / "a" / "2.jpg").write_bytes(CONTENT)
    subprocess.run(["tar", "cSf", "x.tar", "a"], cwd=tmp_path, check=True)
    source = scan(tmp_path / "x.tar")
    assert named(source) == [("a/2.jpg", "a")]
    assert source.rejected == [("a/1.jpg", "sparse member; pack it as a plain file")]


def test_names_that_are_no_utf_8_are_kept(tmp_path):
    name = os.fsdecode(b"caf\xe9/\xff.jpg")
    for source in (scan(write_tree(tmp_path / "x", [name])), scan(write_tar(tmp_path / "x.tar", [name]))):
        assert named(source) == [(name, os.fsdecode(b"caf\xe9"))]
        assert read(source) == [CONTENT + os.fsencode(name)]


@pytest.mark.parametrize("cut", ["without an end", "in a header", "garbage for a header"])
def test_a_tar_that_ends_between_two_members_is_refused(tmp_path, cut):
    whole = write_tar(tmp_path / "x.tar", [f"a/{number}.jpg" for number in range(4)]).read_bytes()
    two = whole[: 4 * 512]  # header, content, header, content
    ends = {"without an end": two, "in a header": two + whole[:100], "garbage for a header": two + b"x" * 512 + whole}
    (tmp_path / "x.tar").write_bytes(ends[cut])
    refuse(tmp_path / "x.tar", "not a whole, uncompressed tar")
    with tarfile.open(tmp_path / "outer.tar", "w") as tar:
        tar.add(tmp_path / "x.tar", "n01.tar")
    refuse(tmp_path / "outer.tar", r"outer\.tar:n01\.tar is not a whole, uncompressed tar")


def test_a_folder_of_class_tars(tmp_path):
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "n02.tar", ["n02_1.JPEG"])
    write_tar(tmp_path / "in" / "n01.tar", ["n01_7.JPEG", "n01_3.JPEG"])
    source = scan(tmp_path / "in")
    assert named(source) == [("n01/n01_3.JPEG", "n01"), ("n01/n01_7.JPEG", "n01"), ("n02/n02_1.JPEG", "n02")]
    (tmp_path / "in" / "n03").mkdir()
    refuse(tmp_path / "in", "holds tars and, beside them, n03")


def test_links_in_folders_are_followed_or_counted(tmp_path):
    write_tree(tmp_path, ["all/x.jpg", "in/a/1.jpg"])
    (tmp_path / "in/a/2.jpg").symlink_to("../../all/x.jpg")
    (tmp_path / "in/a/deep").symlink_to(tmp_path / "all")
    (tmp_path / "in/a/lost.jpg").symlink_to("nowhere")
    os.mkfifo(tmp_path / "in/a/pipe.jpg")
    source = scan(tmp_path / "in")
    assert [path for path, _ in named(source)] == ["a/1.jpg", "a/2.jpg", "a/deep/x.jpg"]
    assert source.rejected == [
        ("a/lost.jpg", "a link that leads nowhere (No such file or directory)"),
        ("a/pipe.jpg", "not a regular file"),
    ]
    (tmp_path / "in/a/circle").symlink_to("..")
    refuse(tmp_path / "in", "circle is a link to a folder above it")


def test_kinds_of_sources_agree(tmp_path):
    names = [f"{label}/{number}.jpg" for label in "abc" for number in range(5)]
    write_tree(tmp_path / "in", names)
    write_tar(tmp_path / "flat.tar", names[::-1])
    with tarfile.open(tmp_path / "nested.tar", "w") as tar:
        for label in "abc":
            write_tar(tmp_path / f"{label}.tar", [f"{number}.jpg" for number in range(5)])
            tar.add(tmp_path / f"{label}.tar", f"{label}.tar")
    sources = [scan(tmp_path / name) for name in ("in", "flat.tar", "nested.tar")]
    orders = [[(image.path, image.label) for image in s.take(s.shuffled(seed=3))] for s in sources]
    assert orders[0] == orders[1] == orders[2]
    assert sorted(path for path, _ in orders[0]) == names
    assert orders[0] != [(image.path, image.label) for image in sources[0].take(sources[0].shuffled(seed=4))]


names_of_files = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=()), min_size=1, max_size=9)


@given(st.dictionaries(names_of_files, st.integers(0, 2**40), min_size=1, max_size=30))
def test_a_table_gives_back_what_it_was_given(sizes):
    def is_storable(name: str) -> bool:
        try:
            return bool(name.encode("utf-8", "surrogateescape"))
        except UnicodeEncodeError:
            return False

    table = Table("/root")
    rows = [Found(name, "x.tar", size // 2, size, -size) for name, size in sizes.items() if is_storable(name)]
    for row in rows:
        table.add(row)
    table.close()
    assert list(table.entries()) == [(row.path, row.offset, row.size, row.mtime_ns) for row in rows]
    assert table.sizes().tolist() == [row.size for row in rows]
    order = np.arange(len(rows))[::-1]
    taken = list(table.take(order, np.arange(len(rows), dtype=np.int32)))
    assert [(image.path, image.label, image.size) for image in taken] == [
        (rows[at].path, at, rows[at].size) for at in order
    ]


def test_a_table_larger_than_what_is_read_at_once(monkeypatch):
    monkeypatch.setattr(table_module, "_CHUNK", 3)
    table = Table("/root")
    for number in range(10):
        table.add(Found(f"name{number}", OWN_FILE, 0, number, 0))
    table.close()
    assert list(table.names()) == [f"name{number}" for number in range(10)]
    assert table.sizes().tolist() == list(range(10))


# classes=

CLASSES = ["n01", "n02", "n03"]


@pytest.fixture
def three_classes(tmp_path) -> dict[str, Path]:
    names = [f"{label}/{number}.jpg" for label in CLASSES for number in range(2)]
    for label in CLASSES:
        (tmp_path / "tars").mkdir(exist_ok=True)
        write_tar(tmp_path / "tars" / f"{label}.tar", ["0.jpg", "1.jpg"])
    with tarfile.open(tmp_path / "nested.tar", "w") as tar:
        tar.add(tmp_path / "tars", "train")
    return {
        "folder": write_tree(tmp_path / "folder", [f"train/{name}" for name in names]),
        "tar": write_tar(tmp_path / "flat.tar", names),
        "nested": tmp_path / "nested.tar",
        "tars": tmp_path / "tars",
    }


@pytest.mark.parametrize("kind", ["folder", "tar", "nested", "tars"])
def test_only_the_classes_of_a_list_are_kept(three_classes, tmp_path, kind):
    (tmp_path / "list").write_text("n03\n\nn01\n")
    source = scan(three_classes[kind], classes=str(tmp_path / "list"))
    assert source.classes == ("n01", "n03")
    assert [label for _, label in named(source)] == ["n01", "n01", "n03", "n03"]
    (tmp_path / "one").write_text("n02")
    assert scan(three_classes[kind], classes=str(tmp_path / "one")).classes == ("n02",)


@pytest.mark.parametrize("kind", ["folder", "nested", "tars"])
def test_other_classes_are_not_looked_at(three_classes, tmp_path, kind):
    damage = {
        "folder": lambda: (tmp_path / "folder/train/n02/circle").symlink_to(tmp_path / "folder/train"),
        "tars": lambda: (tmp_path / "tars/n02.tar").write_bytes(b"no tar"),
        "nested": lambda: write_nested_with_a_broken_tar(tmp_path),
    }
    damage[kind]()
    (tmp_path / "list").write_text("n01\nn03\n")
    assert len(scan(three_classes[kind], classes=str(tmp_path / "list"))) == 4
    refuse(three_classes[kind], "n02")


def write_nested_with_a_broken_tar(folder: Path) -> None:
    (folder / "tars/n02.tar").write_bytes(b"x" * 2048)
    with tarfile.open(folder / "nested.tar", "w") as tar:
        tar.add(folder / "tars", "train")


def test_classes_that_are_not_there_are_named(three_classes, tmp_path):
    (tmp_path / "list").write_text("\n".join(["n01", *(f"x{number}" for number in range(9))]))
    with pytest.raises(ValueError, match=r"shard\.classes: 9 of 10 classes .*: x0, x1, x2, x3, x4, \.\.\.; take them"):
        scan(three_classes["tar"], classes=str(tmp_path / "list"))


def test_lists_of_classes(tmp_path):
    shipped = read_class_list("imagenet100")
    assert len(shipped) == 100
    assert {"n02869837", "n01749939"} < shipped
    assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in shipped)
    with pytest.raises(ValueError, match=r"shard\.classes: cannot read nowhere .*give imagenet100 or a file"):
        read_class_list("nowhere")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ValueError, match=r"shard\.classes: .*empty names no class"):
        read_class_list(str(tmp_path / "empty"))
