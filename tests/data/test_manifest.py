import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.manifest import MANIFEST_NAME, Manifest, SampleIndex, parse_index


@pytest.fixture
def shards(drawn_shards, tmp_path) -> Path:
    """Return a private copy, free to be damaged."""
    return Path(shutil.copytree(drawn_shards, tmp_path / "shards"))


def edit(directory: Path, **changes) -> None:
    fields = json.loads((directory / MANIFEST_NAME).read_text())
    (directory / MANIFEST_NAME).write_text(json.dumps(fields | changes))


def test_a_written_manifest_loads_as_it_was(drawn_shards, tmp_path):
    manifest = Manifest.load(drawn_shards)
    manifest.write(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]


def test_a_missing_manifest_names_the_command_that_writes_one(tmp_path):
    with pytest.raises(ValueError, match=r"no manifest\.json.*coldpress shard"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("text", ["{", "\xff\xfe", "[]", "3", '{"schema_version": 2}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / MANIFEST_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="shard the source again"):
        Manifest.load(tmp_path)


def test_missing_fields_are_refused(shards):
    edit(shards, shards=[{"name": "train-000000.tar"}])
    with pytest.raises(ValueError, match="not a manifest"):
        Manifest.load(shards)


@given(st.integers(0, 10**9), st.integers(1, 255))
def test_any_changed_byte_is_found(drawn_shards, tmp_path_factory, at, change):
    content = bytearray((drawn_shards / MANIFEST_NAME).read_bytes())
    content[at % len(content)] ^= change
    directory = tmp_path_factory.mktemp("flipped")
    (directory / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(ValueError, match="again"):
        Manifest.load(directory)


def test_an_edited_manifest_is_refused(shards):
    edit(shards, samples=47)
    with pytest.raises(ValueError, match=r"manifest\.json: damaged, or edited by hand"):
        Manifest.load(shards)


def test_the_fingerprint_follows_every_checksum_and_nothing_else(drawn_shards):
    manifest = Manifest.load(drawn_shards)
    first, *rest = manifest.shards
    assert replace(manifest, source="elsewhere").fingerprint == manifest.fingerprint
    for changed in (replace(first, sha256="0" * 64), replace(first, index_sha256="0" * 64)):
        assert replace(manifest, shards=(changed, *rest)).fingerprint != manifest.fingerprint
    assert replace(manifest, shards=(*rest, first)).fingerprint != manifest.fingerprint


def test_the_index_points_at_every_image_and_label(drawn_shards):
    manifest = Manifest.load(drawn_shards)
    index = SampleIndex.load(drawn_shards, manifest)
    assert index.counts == (10, 10, 10, 10, 8)
    assert len(index) == manifest.samples == 48
    assert [array.dtype for array in (index.shard, index.offset, index.size)] == [np.int32, np.int64, np.int64]
    labels = []
    for row in range(len(index)):
        tar = index.paths[index.shard[row]].read_bytes()
        image = tar[index.offset[row] : index.offset[row] + index.size[row]]
        assert image.startswith(b"\xff\xd8\xff")
        assert image.endswith(b"\xff\xd9")
        labels.append(int(tar[index.label_offset[row] : index.label_offset[row] + index.label_size[row]]))
    assert np.bincount(labels).tolist() == [12, 12, 12, 12]


def test_a_tar_of_another_size_is_refused(shards):
    with (shards / "train-000001.tar").open("ab") as file:
        file.write(b"\0" * 512)
    with pytest.raises(ValueError, match=r"train-000001\.tar: \d+ bytes, manifest.json says"):
        SampleIndex.load(shards, Manifest.load(shards))


@pytest.mark.parametrize("victim", ["train-000001.tar", "train-000001.idx"])
def test_a_missing_file_is_named(shards, victim):
    (shards / victim).unlink()
    with pytest.raises(ValueError, match=f"{victim}: missing"):
        SampleIndex.load(shards, Manifest.load(shards))


def test_the_index_of_another_tar_is_refused(shards):
    shutil.copy(shards / "train-000000.idx", shards / "train-000001.idx")
    with pytest.raises(ValueError, match=r"train-000001\.idx: not the index"):
        SampleIndex.load(shards, Manifest.load(shards))


@pytest.mark.parametrize(("column", "value"), [(1, 10**9), (2, 10**9), (5, 10**9), (5, -512)])
def test_an_extent_outside_its_tar_is_refused(shards, column, value):
    manifest = Manifest.load(shards)
    path = shards / "train-000000.idx"
    header, first, *rest = path.read_text().splitlines()
    fields = first.split()
    fields[column] = str(value)
    path.write_text("\n".join([header, " ".join(fields), *rest]) + "\n")
    matching = replace(manifest.shards[0], index_sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(ValueError, match=r"an extent leaves train-000000\.tar"):
        SampleIndex.load(shards, replace(manifest, shards=(matching, *manifest.shards[1:])))


def test_unlabelled_rows_have_label_size_zero():
    columns = parse_index("v1.2 2\njpg 512 7 a.jpg\njpg 1536 8 b.jpg\n", Path("x.idx"))
    assert columns.tolist() == [[512, 1536], [7, 8], [0, 0], [0, 0]]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "v1.1 1\njpg 512 7 a.jpg\n",
        "v1.2 x\n",
        "v1.2 2\njpg 512 7 a.jpg\n",
        "v1.2 1\njpg 512 7\n",
        "v1.2 1\npng 512 7 a.png\n",
        "v1.2 1\njpg here 7 a.jpg\n",
        "v1.2 2\njpg 512 7 a.jpg\npng 1536 8 b.png\n",
        "v1.2 1\njpg 99999999999999999999 7 a.jpg\n",
        "v1.2 0\njpg 512 7 a.jpg\n",
    ],
)
def test_malformed_indexes_are_refused(text):
    with pytest.raises(ValueError, match=r"^x\.idx: "):
        parse_index(text, Path("x.idx"))


ROW = st.tuples(*[st.integers(0, 2**62)] * 4)


@given(st.lists(ROW, min_size=1))
def test_parse_returns_what_was_written(rows):
    lines = [f"cls {c} {d} {i}.cls jpg {a} {b} {i}.jpg json 0 0 {i}.json" for i, (a, b, c, d) in enumerate(rows)]
    text = f"v1.2 {len(rows)}\n" + "\n".join(lines) + "\n"
    assert parse_index(text, Path("x.idx")).T.tolist() == [list(row) for row in rows]
