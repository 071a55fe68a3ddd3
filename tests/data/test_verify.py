import hashlib
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from data.manifest import MANIFEST_NAME, Manifest
from data.verify import VerificationError, VerifyConfig, run


@pytest.fixture
def shards(drawn_shards, tmp_path) -> Path:
    """Return a private copy, free to be damaged."""
    return Path(shutil.copytree(drawn_shards, tmp_path / "shards"))


def findings(shards: Path) -> str:
    with pytest.raises(VerificationError) as error:
        run(VerifyConfig(str(shards), workers=1))
    return str(error.value)


def edit_manifest(shards: Path, **changes) -> None:
    fields = json.loads((shards / MANIFEST_NAME).read_text())
    (shards / MANIFEST_NAME).write_text(json.dumps(fields | changes))


def forge(shards: Path, number: int = 0) -> None:
    """Make the manifest's checksums those of the files as they are, as a careless tool would."""
    fields = json.loads((shards / MANIFEST_NAME).read_text())
    entry = fields["shards"][number]
    tar = shards / entry["name"]
    for key, file in (("sha256", tar), ("index_sha256", tar.with_suffix(".idx"))):
        entry[key] = hashlib.sha256(file.read_bytes()).hexdigest()
    (shards / MANIFEST_NAME).write_text(json.dumps(fields))


def overwrite_member(tar: Path, name: str, content: bytes) -> None:
    """Change a member's bytes in place, from its first byte on."""
    with tarfile.open(tar) as archive:
        offset = archive.getmember(name).offset_data
    with tar.open("r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_sound_set_is_verified(drawn_shards, capsys, workers):
    run(VerifyConfig(str(drawn_shards), workers=workers))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "verified: 48 samples in 5 shards agree with manifest.json"
    assert "findings    0" in lines


def test_an_unfinished_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        run(VerifyConfig(str(tmp_path)))


def test_a_flipped_bit_is_found(shards):
    overwrite_member(shards / "train-000003.tar", "000000035.jpg", b"\xfe")
    assert "train-000003.tar: SHA-256 of train-000003.tar is not the manifest's" in findings(shards)


def test_a_cut_tar_is_found(shards):
    tar = shards / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:9000])
    text = findings(shards)
    assert "train-000001.tar: 9000 bytes, the manifest says" in text
    assert "train-000001.tar: not a readable tar" in text
    assert "manifest.json: 48 samples, the shards hold" in text


@pytest.mark.parametrize("victim", ["train-000002.tar", "train-000002.idx"])
def test_a_missing_file_is_found(shards, victim):
    (shards / victim).unlink()
    assert f"train-000002.tar: {victim} is missing" in findings(shards)


def test_a_shifted_offset_is_found_whatever_the_checksums_say(shards):
    index = shards / "train-000000.idx"
    index.write_text(index.read_text().replace("cls 512 ", "cls 1024 "))
    forge(shards)
    assert findings(shards).endswith(
        "train-000000.tar: train-000000.idx differs from the tar in 1 lines, the first is 2"
    )


def test_a_short_index_is_found(shards):
    index = shards / "train-000000.idx"
    index.write_text("\n".join(index.read_text().splitlines()[:-1]) + "\n")
    forge(shards)
    assert "train-000000.idx has 10 lines, the tar asks for 11" in findings(shards)


def test_a_label_without_a_class_is_found(shards):
    overwrite_member(shards / "train-000000.tar", "000000004.cls", b"9")
    forge(shards)
    assert "sample 000000004 has label b'9', there are 4 classes" in findings(shards)


def test_an_image_that_does_not_decode_is_found(shards):
    overwrite_member(shards / "train-000000.tar", "000000005.jpg", b"no image")
    forge(shards)
    assert "sample 000000005 does not decode" in findings(shards)


def test_keys_that_occur_twice_are_found(shards):
    for ending in (".tar", ".idx"):
        shutil.copy(shards / f"train-000000{ending}", shards / f"train-000001{ending}")
    forge(shards, 1)
    assert findings(shards).count("occurs twice") == 10


def test_wrong_totals_are_found(shards):
    manifest = Manifest.load(shards)
    edit_manifest(shards, samples=47, bytes=manifest.bytes + 1)
    text = findings(shards)
    assert "manifest.json: 47 samples, the shards hold 48" in text
    assert f"manifest.json: {manifest.bytes + 1} bytes, the shards hold {manifest.bytes}" in text


def test_a_tar_that_no_one_listed_is_found(shards):
    shutil.copy(shards / "train-000000.tar", shards / "train-000009.tar")
    (shards / "notes.txt").write_text("harmless")
    text = findings(shards)
    assert "train-000009.tar: not in the manifest" in text
    assert "1 finding" in text


def test_labels_in_a_set_without_classes_are_found(shards):
    edit_manifest(shards, classes=[])
    assert "sample 000000000 has members cls, jpg, json instead of jpg, json" in findings(shards)


def test_negative_workers_are_refused():
    with pytest.raises(ValueError, match=r"^verify\.workers: must be"):
        VerifyConfig("x", workers=-1)
