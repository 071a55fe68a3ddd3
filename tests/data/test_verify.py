import hashlib
import io
import json
import random
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from data.manifest import MANIFEST_NAME, Manifest, sample_checksum
from data.rejected import REJECTED_NAME, encode_rejected
from data.verify import VerificationError, VerifyConfig, _rejected_findings, run
from data.verify_shard import MOST_FINDINGS, ShardCheck, check_shard


@pytest.fixture
def shards(drawn_shards, tmp_path) -> Path:
    """Return a private copy, free to be damaged."""
    return Path(shutil.copytree(drawn_shards, tmp_path / "shards"))


def findings(shards: Path) -> str:
    with pytest.raises(VerificationError) as error:
        run(VerifyConfig(str(shards), workers=1))
    return str(error.value)


def edit_manifest(directory: Path, **changes) -> None:
    """Write a sound manifest that says something else, as a careless tool would."""
    replace(Manifest.load(directory), **changes).write(directory)


def forge(shards: Path, number: int = 0) -> None:
    """Make the manifest's checksums and sizes of a shard those of the files as they are."""
    entries = list(Manifest.load(shards).shards)
    tar = shards / entries[number].name
    sums = [hashlib.sha256(file.read_bytes()).hexdigest() for file in (tar, tar.with_suffix(".idx"))]
    entries[number] = replace(entries[number], bytes=tar.stat().st_size, sha256=sums[0], index_sha256=sums[1])
    edit_manifest(shards, shards=tuple(entries), bytes=sum(entry.bytes for entry in entries))


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
    assert "train-000003.tar: SHA-256 is not the manifest's" in findings(shards)


def test_a_cut_tar_is_found(shards):
    tar = shards / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:9000])
    text = findings(shards)
    assert "train-000001.tar: 9000 bytes, the manifest says" in text
    assert "train-000001.tar: not a readable tar" in text
    assert "manifest.json" not in text.partition("\n")[2]  # its totals are right; the shard is what is wrong


@pytest.mark.parametrize("victim", ["train-000002.tar", "train-000002.idx"])
def test_a_missing_file_is_found(shards, victim):
    (shards / victim).unlink()
    text = findings(shards)
    assert text.splitlines()[1:] == [f"  {victim}: missing"]
    assert "1 finding(s); delete the damaged files, and the `coldpress shard` command of this set writes" in text


def test_a_shifted_offset_is_found_whatever_the_checksums_say(shards):
    index = shards / "train-000000.idx"
    index.write_text(index.read_text().replace("cls 512 ", "cls 1024 "))
    forge(shards)
    assert findings(shards).endswith("train-000000.idx: differs from the tar in 1 lines, the first is 2")


def test_a_short_index_is_found(shards):
    index = shards / "train-000000.idx"
    index.write_text("\n".join(index.read_text().splitlines()[:-1]) + "\n")
    forge(shards)
    assert "train-000000.idx: 10 lines, the tar asks for 11" in findings(shards)


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


def write_shard(tar: Path, members: list[tuple[str, bytes]]) -> None:
    """Pack members, and write their index, in plain tarfile's way."""
    rows: dict[str, list[str]] = {}
    with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            key, _, extension = name.partition(".")
            rows.setdefault(key, []).append(f"{extension} {archive.offset + 512} {info.size} {name}")
            archive.addfile(info, io.BytesIO(content))
    lines = "".join(f"{' '.join(row)}\n" for row in rows.values())
    tar.with_suffix(".idx").write_text(f"v1.2 {len(rows)}\n{lines}")


def rewrite_member(shards: Path, name: str, content: bytes, to: str = "") -> None:
    """Pack the first shard anew with one member changed, or named otherwise; index and all checksums match."""
    tar = shards / "train-000000.tar"
    with tarfile.open(tar) as archive:
        members = {info.name: archive.extractfile(info).read() for info in archive} | {name: content}
    key, _, extension = name.partition(".")
    if extension != "json":
        facts = json.loads(members[f"{key}.json"])
        facts["crc32"] = sample_checksum(members[f"{key}.cls"], members[f"{key}.jpg"])
        members[f"{key}.json"] = json.dumps(facts).encode()
    write_shard(tar, [(to if to and each == name else each, content) for each, content in members.items()])
    forge(shards)


@pytest.mark.parametrize(
    ("to", "finding"),
    [
        ("image7.jpg", "sample 'image7' has a key that is not a number"),
        ("000000007.\x1b[2Jjpg", r"has members cls, \x1b[2Jjpg, json instead of cls, jpg, json"),
        ("000000007.jpeg", "has members cls, jpeg, json instead of cls, jpg, json"),
    ],
)
def test_names_of_another_form_are_found_and_shown_harmlessly(shards, to, finding):
    rewrite_member(shards, "000000007.jpg", picture(), to)
    text = findings(shards)
    assert finding in text
    assert "\x1b" not in text


def picture(side: int = 48, form: str = "JPEG", **options) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), "gray").save(out, form, **options)
    return out.getvalue()


def test_a_set_packed_anew_by_another_writer_is_verified(shards):
    rewrite_member(shards, "000000003.jpg", picture())
    run(VerifyConfig(str(shards), workers=1, deep=True))


@pytest.mark.parametrize("name", ["train-000003.tar", "train-000003.idx", MANIFEST_NAME])
def test_every_flipped_byte_is_found_and_its_file_named(drawn_shards, tmp_path_factory, name):
    content = (drawn_shards / name).read_bytes()
    rng = random.Random(name)
    places = {0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(38))}
    for at in sorted(places):
        copy = Path(shutil.copytree(drawn_shards, tmp_path_factory.mktemp("flip") / "shards"))
        damaged = bytearray(content)
        damaged[at] ^= rng.randrange(1, 256)
        (copy / name).write_bytes(damaged)
        assert name in findings(copy), at


def test_a_damaged_manifest_is_the_only_finding(shards):
    path = shards / MANIFEST_NAME
    path.write_text(path.read_text().replace('"disc"', '"dish"'))
    text = findings(shards)
    assert "has 1 finding(s)" in text
    assert f"{path}: damaged, or edited by hand" in text


def test_a_manifest_without_shards_is_found(shards):
    edit_manifest(shards, shards=(), samples=0, bytes=0, treatments={})
    assert "manifest.json: lists no shards" in findings(shards)


@pytest.mark.parametrize("cut", [0, 1, 511, 512, 700, 10240])
def test_a_truncated_shard_is_found_wherever_it_ends(shards, cut):
    tar = shards / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:cut])
    assert f"train-000001.tar: {cut} bytes, the manifest says" in findings(shards)
    assert "train-000001.tar: not a readable tar" in findings(shards)


def test_bytes_behind_the_archive_are_found(shards):
    tar = shards / "train-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    forge(shards, 1)
    assert "not a readable tar: other bytes than zeros follow the end of the archive" in findings(shards)


def test_bytes_between_members_are_found(shards):
    tar = shards / "train-000001.tar"
    content = bytearray(tar.read_bytes())
    content[1023] = 1  # the label's block is otherwise empty
    tar.write_bytes(content)
    forge(shards, 1)
    assert "byte 513: '000000010.cls' is followed by other bytes than zeros" in findings(shards)


def header(**fields) -> bytes:
    info = tarfile.TarInfo("000000030.jpg")
    for name, value in fields.items():
        setattr(info, name, value)
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (header(size=2**60), "announces 1152921504606846976 bytes, more than there are"),
        (header(size=-512), "announces -512 bytes, more than there are"),
        (header(type=tarfile.SYMTYPE, linkname="/etc/passwd"), "is not a plain file"),
        (header(type=tarfile.DIRTYPE), "is not a plain file"),
        (header(type=tarfile.GNUTYPE_LONGNAME, size=2**40), "is not a plain file"),
        (header(type=tarfile.GNUTYPE_SPARSE), "is not a plain file"),
        (header(type=tarfile.XHDTYPE), "is not a plain file"),
        (b"\xff" * 512, "byte 0: "),
    ],
)
def test_headers_that_ask_for_more_are_not_followed(shards, block, reason):
    tar = shards / "train-000003.tar"
    tar.write_bytes(block + tar.read_bytes()[512:])
    forge(shards, 3)
    text = findings(shards)
    assert "train-000003.tar: not a readable tar: byte 0: " in text
    assert reason in text


def test_a_folder_in_the_place_of_a_shard_is_found(shards):
    (shards / "train-000002.tar").unlink()
    (shards / "train-000002.tar").mkdir()
    assert "train-000002.tar: cannot be read (Is a directory)" in findings(shards)


def test_the_index_of_another_tar_is_found(shards):
    shutil.copy(shards / "train-000001.idx", shards / "train-000002.idx")
    text = findings(shards)
    assert "train-000002.idx: SHA-256 is not the manifest's" in text
    assert "train-000002.idx: differs from the tar in 10 lines, the first is 2" in text


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        (picture(form="PNG"), "is not a regular gray or RGB JPEG"),
        (picture()[:-2], r"does not decode \(truncated: the JPEG has no end marker\)"),
        (picture(40), "has 40x40 pixels, its json says 48x48"),
    ],
)
def test_deep_decodes_every_image(shards, content, finding):
    rewrite_member(shards, "000000007.jpg", content)
    run(VerifyConfig(str(shards), workers=1))  # one image per shard, and not this one
    with pytest.raises(VerificationError, match=f"1 finding.*\n.*train-000000.tar: sample 000000007 {finding}"):
        run(VerifyConfig(str(shards), workers=1, deep=True))


def test_deep_says_how_many_were_decoded(drawn_shards, capsys):
    run(VerifyConfig(str(drawn_shards), workers=1))
    run(VerifyConfig(str(drawn_shards), workers=1, deep=True))
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("decoded")] == ["decoded     5", "decoded     48"]


FACTS = b'"path": "x", "height": 48, "width": 48'


@pytest.mark.parametrize(
    "facts", [b"", b"{", b"[]", b'{"path": "x", "crc32": 1}', b"{%b}" % FACTS, b'{%b, "crc32": "a"}' % FACTS]
)
def test_a_sample_without_its_facts_is_found(shards, facts):
    rewrite_member(shards, "000000007.json", facts)
    assert "sample 000000007 has no path, height, width and crc32 in its json" in findings(shards)


def test_a_sample_whose_bytes_are_another_ones_is_found(shards):
    """Every sum of the tar agrees; only what the reader holds each sample against does not."""
    rewrite_member(shards, "000000007.json", b'{%b, "crc32": 1}' % FACTS)
    assert "sample 000000007 does not have the checksum in its json" in findings(shards)


def test_largest_sides_and_treatments_are_compared(shards):
    edit_manifest(shards, max_height=64, max_width=47, treatments={"kept": 47})
    text = findings(shards)
    assert "manifest.json: 64 max_height, the shards hold 48" in text
    assert "manifest.json: 47 max_width, the shards hold 48" in text
    assert "manifest.json: treatments of 47 samples, there are 48" in text


@pytest.fixture
def with_rejected(shards) -> Path:
    """Return a set beside which lies a list of two rejected images, a name with line ends among them."""
    listed = encode_rejected([("z.jpg", "empty file"), ("a\n.jpg", "truncated")])
    (shards / REJECTED_NAME).write_bytes(listed)
    edit_manifest(shards, rejected=2, rejected_sha256=hashlib.sha256(listed).hexdigest())
    return shards


def test_rejected_images_are_counted(with_rejected, capsys):
    run(VerifyConfig(str(with_rejected), workers=1))
    assert "rejected    2" in capsys.readouterr().out.splitlines()
    edit_manifest(with_rejected, rejected=3)
    assert "manifest.json: 3 rejected, rejected.csv lists 2" in findings(with_rejected)


def test_every_change_of_the_list_of_rejected_images_is_found(with_rejected):
    path = with_rejected / REJECTED_NAME
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert _only_finding(with_rejected) == "rejected.csv: SHA-256 is not the manifest's"
    path.write_bytes(content + b"b.jpg,truncated\n")
    assert _only_finding(with_rejected) == "rejected.csv: SHA-256 is not the manifest's"
    path.unlink()
    assert _only_finding(with_rejected) == "rejected.csv: missing, there were 2 rejected images"


def test_a_list_of_rejected_images_that_no_one_listed_is_found(shards):
    (shards / REJECTED_NAME).write_bytes(encode_rejected([("z.jpg", "empty file")]))
    assert "rejected.csv: not in the manifest" in findings(shards)


def _only_finding(shards: Path) -> str:
    (finding,) = _rejected_findings(shards, Manifest.load(shards))
    return finding


def test_a_broken_shard_does_not_fill_the_screen(shards):
    edit_manifest(shards, classes=("disc",))
    text = findings(shards)
    assert text.count("train-000000.tar: sample") <= MOST_FINDINGS
    tar = shards / "train-000000.tar"
    report = check_shard(ShardCheck(str(tar), Manifest.load(shards).shards[0], classes=0, deep=False))
    for _ in range(30):
        report.find("again")
    assert (len(report.findings), report.more) == (MOST_FINDINGS, 20)


def test_a_sorted_set_is_verified_with_a_warning(shards, capsys):
    samples = []
    for tar in sorted(shards.glob("*.tar")):
        with tarfile.open(tar) as archive:
            contents = [archive.extractfile(info).read() for info in archive]
        samples += [contents[at : at + 3] for at in range(0, len(contents), 3)]
        tar.unlink()
        tar.with_suffix(".idx").unlink()
    members = [
        (f"{number:09d}.{extension}", content)
        for number, sample in enumerate(sorted(samples))
        for extension, content in zip(("cls", "jpg", "json"), sample, strict=True)
    ]
    write_shard(shards / "train-000000.tar", members)
    edit_manifest(shards, shards=(replace(Manifest.load(shards).shards[0], samples=48),))
    forge(shards)
    run(VerifyConfig(str(shards), workers=1))
    lines = capsys.readouterr().out.splitlines()
    assert "shuffle     0.00 (class runs of 12.00, 1.31 if random)" in lines
    assert lines[-2].startswith("warning: shuffle quality 0.00 is below 0.9: neighbors are of one class more often")
    assert f"`coldpress shard source={shards} output=...`" in lines[-2]
    assert lines[-1].startswith("verified: ")


def test_negative_workers_are_refused():
    with pytest.raises(ValueError, match=r"^verify\.workers: must be"):
        VerifyConfig("x", workers=-1)
