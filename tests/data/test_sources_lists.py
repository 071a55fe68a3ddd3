import sys
from pathlib import Path

import pytest

from data.manifest import MANIFEST_NAME
from data.shard import ShardConfig, run
from data.sources import scan

LISTED = "path,label\nimages/b.jpg,7\n./images/a.jpg,10\n"


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    for name in "abc":
        (tmp_path / "images" / f"{name}.jpg").write_bytes(name.encode())
    return tmp_path


def named(source):
    return [(image.path, source.classes[image.label] if image.label >= 0 else None) for image in sorted(source)]


@pytest.mark.parametrize("text", [LISTED, "\ufeff" + LISTED, LISTED.replace("\n", "\r\n")])
def test_a_csv_of_paths_and_labels(folder, text):
    (folder / "list.csv").write_text(text, newline="")
    source = scan(folder / "list.csv")
    assert named(source) == [("images/a.jpg", "10"), ("images/b.jpg", "7")]
    assert source.classes == ("7", "10")


def test_columns_may_be_more_and_in_any_order(folder):
    (folder / "list.tsv").write_text('label\tsplit\tpath\n"sea, blue"\ttrain\timages/a.jpg\n')
    assert named(scan(folder / "list.tsv")) == [("images/a.jpg", "sea, blue")]


def test_a_list_without_labels(folder):
    (folder / "list.csv").write_text("path\nimages/a.jpg\n")
    assert named(scan(folder / "list.csv")) == [("images/a.jpg", None)]


def test_files_that_are_not_there_are_rejected(folder):
    (folder / "list.csv").write_text("path,label\nimages/a.jpg,x\nimages/z.jpg,x\nimages,x\nb\0d.jpg,x\n")
    source = scan(folder / "list.csv")
    assert named(source) == [("images/a.jpg", "x")]
    assert [path for path, _ in source.rejected] == ["b\0d.jpg", "images", "images/z.jpg"]
    assert source.rejected[2][1] == "cannot be read (No such file or directory)"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", r"no column 'path' \(columns: none\)"),
        ("image,label\na.jpg,1\n", r"no column 'path' \(columns: image, label\)"),
        ("path,label\na.jpg\n", "line 2: not one value for every column"),
        ("path,label\na.jpg,1,2\n", "line 2: not one value for every column"),
        ("path,label\n,1\n", "line 2: not one value for every column"),
        (
            "path,label\nimages/a.jpg,1\nimages/b.jpg,\n",
            r"images without \(images/b\.jpg\); give every row of the list",
        ),
        ('path,label\nimages/a.jpg,"1\nimages/b.jpg,2\n', "line 2: unexpected end of data; close every quote"),
        ('path,label\nimages/a.jpg,"1\nimages/b.jpg,2"\n', "line 2: a label of several lines; close every quote"),
        ('path,label\nimages/a.jpg,"1"x\n', "line 2: ',' expected after '\"'"),
        ("path,label\nimages/a.jpg,cat\n./images/a.jpg,dog\n", r"images/a\.jpg has two classes, cat and dog; keep one"),
        ("path,label\nimages/a.jpg,\nimages/a.jpg,dog\n", r"images/a\.jpg has two classes, none and dog"),
        ("path,label\n" + "x" * 200_000 + ",1\n", "line 2: field larger than"),
        ("path,label\n", "no image in .*list.csv"),
    ],
)
def test_unusable_lists_are_refused(folder, text, match):
    (folder / "list.csv").write_text(text)
    with pytest.raises(ValueError, match=match) as error:
        scan(folder / "list.csv")
    assert str(error.value).startswith("shard.source: ")


def test_rows_that_say_the_same_twice_are_counted(folder):
    (folder / "list.csv").write_text("path,label\nimages/a.jpg,1\nimages/b.jpg,1\n./images/a.jpg,1\nimages/a.jpg,1\n")
    source = scan(folder / "list.csv")
    assert named(source) == [("images/a.jpg", "1"), ("images/b.jpg", "1")]
    assert source.rejected == []
    assert source.ignored == {"listed again": 2}


def test_blanks_beside_commas_are_no_part_of_paths_and_labels(folder):
    (folder / "images" / " d.jpg").write_bytes(b"d")
    (folder / "list.csv").write_text("path, label\nimages/a.jpg , cat\n images/b.jpg,cat \nimages/ d.jpg,cat\n")
    source = scan(folder / "list.csv")
    assert named(source) == [("images/ d.jpg", "cat"), ("images/a.jpg", "cat"), ("images/b.jpg", "cat")]


def test_rejected_rows_count_under_a_list_of_classes(folder):
    (folder / "list.csv").write_text("path,label\nimages/a.jpg,cat\nnope.jpg,cat\nneither.jpg,dog\nimages/c.jpg,dog\n")
    (folder / "wanted").write_text("cat\n")
    source = scan(folder / "list.csv", classes=str(folder / "wanted"))
    assert named(source) == [("images/a.jpg", "cat")]
    assert [path for path, _ in source.rejected] == ["nope.jpg"]
    assert source.ignored == {"images of other classes": 2}


def test_only_wanted_classes_of_a_list(folder):
    (folder / "list.csv").write_text(LISTED)
    (folder / "wanted").write_text("10\n")
    assert named(scan(folder / "list.csv", classes=str(folder / "wanted"))) == [("images/a.jpg", "10")]


def test_a_list_of_class_folders_gives_the_same_set(drawn_folder, drawn_shards, tmp_path):
    rows = [f"{path.relative_to(drawn_folder)},{path.parent.name}\n" for path in drawn_folder.glob("*/*")]
    list_file = drawn_folder / "list.csv"
    list_file.write_text("path,label\n" + "".join(rows))
    try:
        run(ShardConfig(str(list_file), str(tmp_path / "out"), samples_per_shard=10, workers=1))
    finally:
        list_file.unlink()
    for path in tmp_path.joinpath("out").iterdir():
        assert path.name == MANIFEST_NAME or path.read_bytes() == (drawn_shards / path.name).read_bytes()


def test_parquet_without_pyarrow_is_one_sentence(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (folder / "list.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"is Parquet, which PyArrow reads; `pip install pyarrow`, or give .* CSV"):
        scan(folder / "list.parquet")


def test_parquet_with_pyarrow(folder):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"path": ["images/a.jpg", "images/b.jpg"], "label": [10, 7], "other": [0, 0]})
    parquet.write_table(table, folder / "list.parquet")
    assert named(scan(folder / "list.parquet")) == [("images/a.jpg", "10"), ("images/b.jpg", "7")]
    (folder / "list.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="is not Parquet"):
        scan(folder / "list.parquet")
