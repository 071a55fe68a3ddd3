import io
import os
import tarfile
from pathlib import Path

import pytest

from data.sources import scan

CONTENT = b"any bytes: a scan does not decode"


def write_tree(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(CONTENT + name.encode())
    return root


def write_tar(path: Path, names: list[str], **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            content = CONTENT + name.encode()
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


CLASS_FOLDER = ["b/2.JPEG", "a/1.jpg", "a/more/3.png", "a/notes.txt", ".hidden/x.jpg", "a/._1.jpg"]
EXPECTED = [("a/1.jpg", "a"), ("a/more/3.png", "a"), ("b/2.JPEG", "b")]


def named(source):
    return [(image.path, image.label) for image in source.images]


def test_a_class_folder(tmp_path):
    source = scan(write_tree(tmp_path, CLASS_FOLDER))
    assert named(source) == EXPECTED
    assert source.classes == ("a", "b")
    assert [image.read() for image in source.images] == [CONTENT + path.encode() for path, _ in EXPECTED]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("prefix", ["", "./", "long" * 40 + "/train/"])
def test_a_tar_of_a_class_folder(tmp_path, form, prefix):
    if form == tarfile.USTAR_FORMAT:
        prefix = prefix.replace("long" * 40, "short")
    source = scan(write_tar(tmp_path / "x.tar", [prefix + name for name in CLASS_FOLDER[:4]], format=form))
    assert [image.label for image in source.images] == ["a", "a", "b"]
    assert source.images[0].read() == CONTENT + f"{prefix}a/1.jpg".encode()


def test_an_archive_of_class_archives_is_read_in_place(tmp_path):
    write_tar(tmp_path / "n02.tar", ["n02_1.JPEG"])
    write_tar(tmp_path / "n01.tar", ["n01_7.JPEG", "n01_3.JPEG"])
    with tarfile.open(tmp_path / "ILSVRC2012_img_train.tar", "w") as tar:
        tar.add(tmp_path / "n02.tar", "n02.tar")
        tar.add(tmp_path / "n01.tar", "n01.tar")
    source = scan(tmp_path / "ILSVRC2012_img_train.tar")
    assert named(source) == [("n01/n01_3.JPEG", "n01"), ("n01/n01_7.JPEG", "n01"), ("n02/n02_1.JPEG", "n02")]
    assert {image.file for image in source.images} == {str(tmp_path / "ILSVRC2012_img_train.tar")}
    assert [image.read()[len(CONTENT) :] for image in source.images] == [
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
    assert [image.path for image in source.images] == ["a/1.jpg", "b/1.jpg"]
    assert source.images[0].offset > source.images[1].offset


def test_the_fingerprint_follows_names_sizes_and_times(tmp_path):
    write_tree(tmp_path, ["a/1.jpg", "b/2.jpg"])
    first = scan(tmp_path).fingerprint()
    assert scan(tmp_path).fingerprint() == first
    os.utime(tmp_path / "a/1.jpg", (0, 0))
    second = scan(tmp_path).fingerprint()
    (tmp_path / "b/2.jpg").rename(tmp_path / "b/3.jpg")
    assert len({first, second, scan(tmp_path).fingerprint()}) == 3


def test_a_file_that_changes_after_the_scan_is_not_read(tmp_path):
    source = scan(write_tree(tmp_path, ["a/1.jpg"]))
    (tmp_path / "a/1.jpg").write_bytes(b"short")
    with pytest.raises(ValueError, match="changed while it was read"):
        source.images[0].read()
    (tmp_path / "a/1.jpg").write_bytes(bytes(source.images[0].size))
    os.utime(tmp_path / "a/1.jpg", (1, 1))
    with pytest.raises(ValueError, match="changed while it was read"):
        source.images[0].read()
    (tmp_path / "a/1.jpg").unlink()
    with pytest.raises(ValueError, match=r"cannot read a/1\.jpg"):
        source.images[0].read()


def refuse(path: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        scan(path)
    assert str(error.value).startswith("shard.source: ")
    assert str(error.value).endswith(".")


def test_missing_and_empty_sources_are_refused(tmp_path):
    refuse(tmp_path / "nowhere", "no such file or folder .*nowhere; give a class folder")
    refuse(write_tree(tmp_path / "texts", ["a/readme.txt"]), "no image in .*texts; give a class folder")
    refuse(write_tar(tmp_path / "texts.tar", ["a/readme.txt"]), "no image in .*; give a class folder")


def test_what_is_not_a_plain_whole_tar_is_refused(tmp_path):
    (tmp_path / "x.jpg").write_bytes(CONTENT)
    refuse(tmp_path / "x.jpg", "not a whole, uncompressed tar")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "x.jpg", "a/x.jpg")
    refuse(tmp_path / "x.tar.gz", "not a whole, uncompressed tar")
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


def test_links_inside_a_tar_are_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("a/1.jpg")
        info.type, info.linkname = tarfile.LNKTYPE, "b/1.jpg"
        tar.addfile(info)
    refuse(tmp_path / "x.tar", "is a link.*--hard-dereference")
