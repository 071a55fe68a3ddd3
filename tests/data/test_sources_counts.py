"""Samples, rejected and ignored together are all files that a scan has seen."""

import errno
import io
import os
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from data.images import RejectedError
from data.pack import ShardTask, pack
from data.shard import ShardConfig, run
from data.sources import describe, scan
from data.sources import extents as extents_module
from data.sources.extents import ExtentReader


def write_files(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(name))
    return root


def write_tar(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
    return path


def write_tar_of(path: Path, files: list[Path]) -> Path:
    with tarfile.open(path, "w") as tar:
        for file in files:
            tar.add(file, file.name)
    return path


def named(source):
    return [(image.path, source.classes[image.label] if image.label >= 0 else None) for image in sorted(source)]


def read(source) -> list[bytes]:
    with ExtentReader() as reader:
        return [reader.read(image) for image in sorted(source)]


MIXED = [
    *("a/1.jpg", "a/2.jfif", "a/3.JPE", "b/4.jpeg"),
    *("a/5.avif", "a/6.AVIF", "b/7.heic", "b/8", "b/9.2024", "notes.txt", ".hidden", "b/._4.jpg"),
]
IGNORED = {".avif": 2, ".heic": 1, "without a suffix": 2, ".txt": 1, "hidden": 2}


def test_every_file_of_a_folder_or_tar_is_counted(tmp_path):
    for source in (scan(write_files(tmp_path / "in", MIXED)), scan(write_tar(tmp_path / "in.tar", MIXED))):
        assert [path for path, _ in named(source)] == ["a/1.jpg", "a/2.jfif", "a/3.JPE", "b/4.jpeg"]
        assert source.ignored == IGNORED
        assert len(source) + len(source.rejected) + source.ignored.total() == len(MIXED)


def test_files_beside_class_tars_are_counted(tmp_path):
    (tmp_path / "in").mkdir()
    tars = [write_tar(tmp_path / "in" / f"n{number}.tar", ["1.jpg", "x.xml"]) for number in range(3)]
    write_files(tmp_path / "in", ["readme.txt", ".DS_Store"])
    assert scan(tmp_path / "in").ignored == {".xml": 3, ".txt": 1, "hidden": 1}
    assert scan(write_tar_of(tmp_path / "all.tar", tars)).ignored == {".xml": 3}


def test_what_other_classes_hold_is_counted(tmp_path):
    names = ["a/1.jpg", "b/2.jpg", "c/3.jpg"]
    (tmp_path / "list").write_text("a")
    (tmp_path / "tars").mkdir()
    tars = [write_tar(tmp_path / "tars" / f"{label}.tar", ["1.jpg"]) for label in "abc"]
    expected = {
        write_files(tmp_path / "in", names): "folders of other classes",
        tmp_path / "tars": "tars of other classes",
        write_tar_of(tmp_path / "all.tar", tars): "tars of other classes",
        write_tar(tmp_path / "flat.tar", names): "images of other classes",
    }
    for path, group in expected.items():
        assert scan(path, classes=str(tmp_path / "list")).ignored == {group: 2}


def test_the_table_says_what_was_ignored(drawn_folder, tmp_path, capsys):
    names = [f"{path.parent.name}/{path.name}" for path in drawn_folder.glob("*/*")]
    for name in names[:5]:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes((drawn_folder / name).read_bytes())
    write_files(tmp_path / "in", ["a.txt", "b.txt", "c.txt", "d.avif", "e.avif"])
    run(ShardConfig(str(tmp_path / "in"), str(tmp_path / "out"), workers=1))
    assert "\nignored " in (said := capsys.readouterr().out)
    assert said.split("\nignored")[1].splitlines()[0].strip() == "5 (.txt 3, .avif 2)"


def test_many_groups_are_summed_up():
    counter = Counter({f".s{number}": number for number in range(1, 12)})
    assert describe(counter) == "66 (.s11 11, .s10 10, .s9 9, .s8 8, .s7 7, .s6 6, .s5 5, .s4 4, others 6)"


def test_a_link_that_may_have_been_a_class_is_rejected(tmp_path):
    write_files(tmp_path / "in", ["a/1.jpg"])
    for name in ("b", "c.v2"):
        (tmp_path / "in" / name).symlink_to("nowhere")
    (tmp_path / "in/loop").symlink_to("loop")
    (tmp_path / "in/notes.txt").symlink_to("a/1.jpg")
    source = scan(tmp_path / "in")
    assert [path for path, _ in source.rejected] == ["b", "c.v2", "loop"]
    assert source.ignored == {".txt": 1}


def test_suffixes_of_tars_may_be_upper_case(tmp_path):
    (tmp_path / "in").mkdir()
    tars = [
        write_tar(tmp_path / "in" / f"n{number}.{suffix}", ["1.jpg"]) for number, suffix in enumerate(["tar", "TAR"])
    ]
    for source in (scan(tmp_path / "in"), scan(write_tar_of(tmp_path / "all.tar", tars))):
        assert named(source) == [("n0/1.jpg", "n0"), ("n1/1.jpg", "n1")]


def refuse(path: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        scan(path)
    assert str(error.value).startswith("shard.source: ")


@pytest.mark.parametrize("name", ["n2.tar.gz", "n2.tgz", "n2.TAR.GZ", "n2.tar.xz"])
def test_compressed_class_tars_are_refused_with_the_remedy(tmp_path, name):
    (tmp_path / "in").mkdir()
    write_files(tmp_path / "in", [name])
    match = f"{name} is compressed, and images are read in place; unpack it to a plain .tar first"
    refuse(tmp_path / "in", match)
    refuse(write_tar_of(tmp_path / "one.tar", [tmp_path / "in" / name]), match)
    write_tar(tmp_path / "in" / "n1.tar", ["1.jpg"])
    refuse(tmp_path / "in", match)
    refuse(write_tar_of(tmp_path / "all.tar", sorted((tmp_path / "in").iterdir())), match)


def test_beside_class_folders_an_archive_is_ignored(tmp_path):
    names = ["a/1.jpg", "b/1.jpg", "all.tar.gz"]
    assert scan(write_files(tmp_path / "in", names)).ignored == {".gz": 1}
    assert scan(write_tar(tmp_path / "in.tar", names)).ignored == {".gz": 1}


def test_two_tars_in_one_file_are_refused(tmp_path):
    both = b"".join(write_tar(tmp_path / f"{name}.tar", [f"{name}/1.jpg"]).read_bytes() for name in "ab")
    (tmp_path / "c.tar").write_bytes(both)
    refuse(tmp_path / "c.tar", r"more follows its end mark at byte 1024: tars are joined by tar --concatenate")
    (tmp_path / "c.tar").write_bytes((tmp_path / "a.tar").read_bytes() + bytes(3 << 20))
    assert len(scan(tmp_path / "c.tar")) == 1


def test_a_hard_link_names_what_was_there_before_it(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, value in (("a/1.jpg", b"old"), ("a/2.jpg", "a/1.jpg"), ("a/1.jpg", b"new"), ("a/3.jpg", "a/1.jpg")):
            info = tarfile.TarInfo(name)
            if isinstance(value, bytes):
                info.size = len(value)
                tar.addfile(info, io.BytesIO(value))
            else:
                info.type, info.linkname = tarfile.LNKTYPE, value
                tar.addfile(info)
    source = scan(tmp_path / "x.tar")
    assert [path for path, _ in named(source)] == ["a/1.jpg", "a/2.jpg", "a/3.jpg"]
    assert read(source) == [b"new", b"old", b"new"]


def order(path: Path) -> list[str]:
    source = scan(path)
    return [image.path for image in source.take(source.shuffled(seed=3))]


@pytest.mark.parametrize(
    "names", [[f"{label}/{n}.jpg" for label in "ab" for n in range(9)], [f"{n}.jpg" for n in range(9)]]
)
def test_leading_folders_do_not_change_the_order(tmp_path, names):
    plain = order(write_files(tmp_path / "in", names))
    leading = order(write_tar(tmp_path / "x.tar", [f"some/in/{name}" for name in names]))
    if "/" in names[0]:
        assert leading == [f"some/in/{name}" for name in plain]
    else:  # the last shared folder is a class
        assert leading == [f"some/{name}" for name in order(write_tar(tmp_path / "y.tar", [f"in/{n}" for n in names]))]


def test_classes_that_are_numbers_go_by_value_everywhere(tmp_path):
    names = [f"{label}/1.jpg" for label in (10, 9, 100)]
    listed = tmp_path / "list.csv"
    listed.write_text("path,label\n" + "".join(f"in/{name},{name.split('/')[0]}\n" for name in names))
    for path in (write_files(tmp_path / "in", names), write_tar(tmp_path / "in.tar", names), listed):
        assert scan(path).classes == ("9", "10", "100")


@pytest.mark.parametrize("names", [["train/a/1.jpg", "val/a/1.jpg"], ["in/Train/1.jpg", "in/TEST/1.jpg", "in/x/1.jpg"]])
def test_splits_are_no_classes(tmp_path, names):
    paths = write_files(tmp_path / "in", names), write_tar(tmp_path / "in.tar", names)
    for path in paths:
        refuse(path, "splits and no classes; shard each on its own")
    if "/a/" in names[0]:
        (tmp_path / "list").write_text("a")
        for path in paths:
            with pytest.raises(ValueError, match="holds train and val, which are splits"):
                scan(path, classes=str(tmp_path / "list"))


def test_a_task_knows_the_archives_of_its_own_images_only(tmp_path):
    for label in "abcdefgh":
        write_tar(tmp_path / f"{label}.tar", ["1.jpg", "2.jpg"])
    source = scan(tmp_path)
    part = source.take(source.shuffled(seed=0)[:3])
    assert set(part.files.values()) == {image.file for image in part}
    assert len(part.files) <= 3
    assert [image.path for image in part] == [image.path for image in source.take(source.shuffled(seed=0))][:3]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_one_unreadable_file_is_one_rejected_image(drawn_folder, tmp_path, monkeypatch, number):
    source, really = scan(drawn_folder), extents_module._open
    bad = sorted(source)[5]

    def refusing(file: str) -> int:
        if file == bad.file:
            raise OSError(number, os.strerror(number))
        return really(file)

    monkeypatch.setattr(extents_module, "_open", refusing)
    rows = source.shuffled(seed=0)
    packed = pack(ShardTask(str(tmp_path / "x.tar"), 0, source.take(rows), ShardConfig("a", "b").policy()))
    assert packed.rejected == [(bad.path, f"cannot be read ({os.strerror(number)})")]
    assert packed.shard.samples == 47


def test_an_archive_that_cannot_be_opened_is_no_rejection(tmp_path, monkeypatch):
    source = scan(write_tar(tmp_path / "x.tar", ["a/1.jpg"]))

    def refusing(file: str) -> int:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(extents_module, "_open", refusing)
    with pytest.raises(ValueError, match=r"cannot read a/1\.jpg \(Permission denied\); mend that and run the same"):
        read(source)


def test_a_directory_in_place_of_an_image_is_rejected(tmp_path):
    source = scan(write_files(tmp_path, ["a/x.jpg"]))
    (tmp_path / "a/x.jpg").unlink()
    (tmp_path / "a/x.jpg").mkdir()
    with pytest.raises(RejectedError, match="cannot be read"):
        read(source)


def test_an_unreadable_tar_is_one_sentence_with_a_remedy(tmp_path):
    (tmp_path / "x.tar").symlink_to("x.tar")
    refuse(tmp_path, r"cannot list .*; mend that and run the same command again")


def test_an_empty_path_is_no_folder():
    for options in ({"source": "", "output": "b"}, {"source": "a", "output": ""}):
        with pytest.raises(ValueError, match=r"shard\.(source|output): is empty, maybe an unset shell variable"):
            ShardConfig(**options)


@pytest.mark.parametrize("output", ["in", "in/out", "in/a/out", "link/out"])
def test_an_output_in_the_source_is_refused_at_the_start(tmp_path, output):
    write_files(tmp_path / "in", ["a/1.jpg"])
    (tmp_path / "link").symlink_to("in")
    with pytest.raises(ValueError, match=r"shard\.output: .* lies in the source .*; choose a folder beside it"):
        run(ShardConfig(str(tmp_path / "in"), str(tmp_path / output), workers=1))
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["a"]
