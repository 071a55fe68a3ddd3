import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from data.sources import scan

TRUTH = "ILSVRC2012_validation_ground_truth.txt"
IMAGES = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 6)]
# Numbers of the devkit are not the positions of the sorted wnids.
WNIDS = {1: "n03", 2: "n01", 3: "n02", 1001: "n00000001"}
NUMBERS = [2, 3, 3, 1, 2]
EXPECTED = ["n01", "n02", "n02", "n03", "n01"]


def named(source):
    return [(image.path, source.classes[image.label] if image.label >= 0 else None) for image in sorted(source)]


@pytest.fixture
def validation(tmp_path) -> Path:
    """Return a tar as ILSVRC2012_img_val.tar: flat, and in no order."""
    with tarfile.open(tmp_path / "ILSVRC2012_img_val.tar", "w") as tar:
        for name in reversed(IMAGES):
            info = tarfile.TarInfo(name)
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
    return tmp_path / "ILSVRC2012_img_val.tar"


@pytest.fixture
def devkit(tmp_path) -> Path:
    """Return a devkit's folder, its meta.mat with the fields of the official one."""
    data = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    (data / TRUTH).write_text("".join(f"{number}\n" for number in NUMBERS))
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(number, wnid, f"word {number}", "gloss", 0) for number, wnid in WNIDS.items()]
    scipy.io.savemat(data / "meta.mat", {"synsets": np.array(rows, dtype=fields)[:, None]})
    return data.parent


def test_the_devkit_names_the_validation_images(validation, devkit, tmp_path):
    with tarfile.open(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        tar.add(devkit, devkit.name)
    forms = [tmp_path / "ILSVRC2012_devkit_t12.tar.gz", devkit, devkit / "data", devkit / "data" / TRUTH, tmp_path]
    for labels in forms:
        source = scan(validation, labels=str(labels))
        assert named(source) == list(zip(IMAGES, EXPECTED, strict=True))
        assert source.classes == ("n01", "n02", "n03")  # as those of the training set: by name


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("val.txt", "{path} {label}"),
        ("val.csv", '"{path}","{label}"'),
        ("val.tsv", "{stem}\t{label}"),
        ("val.txt", "./{path}   {label}"),
        ("val.txt", "{label}"),
    ],
)
def test_files_of_labels(validation, tmp_path, name, lines):
    rows = [lines.format(path=path, stem=path[:-5], label=label) for path, label in zip(IMAGES, EXPECTED, strict=True)]
    (tmp_path / name).write_text("\n".join(rows) + "\n\n")
    assert named(scan(validation, labels=str(tmp_path / name))) == list(zip(IMAGES, EXPECTED, strict=True))


def test_a_label_file_may_say_more_and_wins_over_folders(tmp_path):
    for label in "ab":
        (tmp_path / "in" / label).mkdir(parents=True)
        (tmp_path / "in" / label / "1.jpg").write_bytes(b"x")
    (tmp_path / "labels.csv").write_text("image,class\na/1.jpg,two words\nb/1.jpg,10\nz.jpg,zebra\n")
    source = scan(tmp_path / "in", labels=str(tmp_path / "labels.csv"))
    assert named(source) == [("a/1.jpg", "two words"), ("b/1.jpg", "10")]


def test_labels_and_a_list_of_classes(validation, devkit, tmp_path):
    (tmp_path / "list").write_text("n02\n")
    source = scan(validation, labels=str(devkit), classes=str(tmp_path / "list"))
    assert named(source) == [(IMAGES[1], "n02"), (IMAGES[2], "n02")]


def refuse(validation: Path, labels: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        scan(validation, labels=str(labels))
    assert str(error.value).startswith("shard.labels: ")


def test_unusable_labels_are_refused(validation, devkit, tmp_path):
    refuse(validation, tmp_path / "nowhere", "no such file or folder .*give ILSVRC2012_devkit_t12")
    (tmp_path / "short.txt").write_text("n01\nn02\n")
    refuse(validation, tmp_path / "short.txt", "has 2 lines of one class each, the source has 5 images")
    (tmp_path / "some.txt").write_text(f"{IMAGES[0]} n01\n")
    refuse(validation, tmp_path / "some.txt", f"has no class for {IMAGES[4]}")
    (tmp_path / "mixed.txt").write_text(f"{IMAGES[0]} n01\nn02\n")
    refuse(validation, tmp_path / "mixed.txt", "lines of one field and of more")
    (tmp_path / "twice.txt").write_text(f"{IMAGES[0]} cat\n{IMAGES[1]} cat\n./{IMAGES[0]} dog\n")
    refuse(validation, tmp_path / "twice.txt", f"gives {IMAGES[0]} two classes, cat and dog; keep one of its lines")
    (tmp_path / "open.csv").write_text(f'{IMAGES[0]},"n01\n{IMAGES[1]},n02\n')
    refuse(validation, tmp_path / "open.csv", "cannot read .*open.csv .*; close every quote")
    (tmp_path / "lines.csv").write_text(f'{IMAGES[0]},"n01\n{IMAGES[1]},n02"\n')
    refuse(validation, tmp_path / "lines.csv", "a field of several lines.*; close every quote")
    (tmp_path / "empty.txt").write_text("")
    refuse(validation, tmp_path / "empty.txt", "lines of one field and of more, or none")
    (tmp_path / "broken.tar.gz").write_bytes(b"x")
    refuse(validation, tmp_path / "broken.tar.gz", "cannot read .*broken")
    (tmp_path / TRUTH).write_text("1\n")
    refuse(validation, tmp_path / TRUTH, r"no meta\.mat in or beside")
    (devkit / "data" / TRUTH).write_text("4\n")
    refuse(validation, devkit, r"names no synset \(4\)")
    (devkit / "data" / "meta.mat").write_bytes(b"x")
    refuse(validation, devkit, r"meta\.mat in .* is not the devkit's")


def test_lines_that_say_the_same_twice_are_no_contradiction(validation, tmp_path):
    lines = [f"{path} {label}\n" for path, label in zip(IMAGES, EXPECTED, strict=True)]
    (tmp_path / "val.txt").write_text("".join(lines * 2))
    assert named(scan(validation, labels=str(tmp_path / "val.txt"))) == list(zip(IMAGES, EXPECTED, strict=True))


def test_image_names_with_blanks_need_a_csv(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "my photo 1.jpg").write_bytes(b"x")
    (tmp_path / "names.txt").write_text("my photo 1.jpg cat\n")
    refuse(
        tmp_path / "in", tmp_path / "names.txt", r"no class for my photo 1\.jpg; image names with blanks need a \.csv"
    )
    (tmp_path / "names.csv").write_text("my photo 1.jpg,cat\n")
    assert named(scan(tmp_path / "in", labels=str(tmp_path / "names.csv"))) == [("my photo 1.jpg", "cat")]


def test_rejected_images_count_under_a_list_of_classes(tmp_path):
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("1.jpg"))
        for name in ("2.jpg", "3.jpg", "4.jpg"):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, "1.jpg"
            tar.addfile(info)
    (tmp_path / "names.txt").write_text("1.jpg cat\n2.jpg cat\n3.jpg dog\n")
    (tmp_path / "list").write_text("cat\n")
    source = scan(tmp_path / "val.tar", labels=str(tmp_path / "names.txt"), classes=str(tmp_path / "list"))
    assert named(source) == [("1.jpg", "cat")]
    assert [path for path, _ in source.rejected] == ["2.jpg", "4.jpg"]  # of 4.jpg nobody knows
    assert source.ignored == {"images of other classes": 1}


def test_the_devkit_without_scipy_is_one_sentence(validation, devkit, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    refuse(validation, devkit, r"which SciPy reads; `pip install scipy`, or give a file of lines `image class`")
