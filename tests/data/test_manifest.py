"""The manifest: read back exactly, strict about its fields, and no damaged byte of the store goes unnoticed."""

import dataclasses
import json
from pathlib import Path

import pytest
from manifest_file import as_older_format, change_manifest

from megat2i.data.indexed import IndexedDataset
from megat2i.data.manifest import BlockDigester, BlockDigests, Manifest, digest_file
from megat2i.files import DataFileError


def flip(path: Path, at: int) -> bytes:
    data = path.read_bytes()
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    return data


def test_reads_back_what_was_written(store_with_manifest, tmp_path):
    manifest = Manifest.read(store_with_manifest)
    manifest.verify(store_with_manifest)
    manifest.write(tmp_path / "again")
    assert Manifest.read(tmp_path / "again") == manifest
    assert manifest.sequences == 46 and manifest.text.vocab_size == 300 and manifest.image.grid == (2, 4)
    assert manifest.sources[0].sha256 is None and manifest.sources[0].size == 12
    assert not list(tmp_path.glob("*.tmp"))
    without_text = dataclasses.replace(manifest, text=None)
    without_text.write(tmp_path / "again")  # replaces
    assert Manifest.read(tmp_path / "again") == without_text != manifest
    assert Manifest.read(tmp_path / "absent") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.update(format_version=3), "format_version is 3, this release reads 1 and 2"),
        (lambda value: value.update(format_version=True), "format_version is True"),
        (lambda value: value.update(format_version=1), r"fields \['sha256'\] of the top level"),
        (lambda value: value.pop("format_version"), "format_version is None"),
        (lambda value: value.pop("dtype"), r"fields \['dtype'\] of the top level"),
        (lambda value: value.update(extra=1), r"fields \['extra'\]"),
        (lambda value: value["image"].pop("grid"), r"fields \['grid'\] of image"),
        (lambda value: value["image"].update(grid=[2]), r"image\.grid is \[2\]"),
        (lambda value: value["text"].update(vocab_size="300"), r"text\.vocab_size is '300', expected int"),
        (lambda value: value["text"].update(vocab_size=True), r"text\.vocab_size is True"),
        (lambda value: value.update(documents=-1), "documents is -1"),
        (lambda value: value.update(dtype="float32"), "dtype is 'float32', expected one of"),
        (lambda value: value["sources"][0].update(samples=None), r"sources\[0\]\.samples is None"),
        (lambda value: value["bin_blocks"].update(block_bytes=0), "block_bytes is 0"),
        (lambda value: value["bin_blocks"].update(sha256=[7]), r"bin_blocks\.sha256\[0\] is 7"),
        (lambda value: value.update(documents=24), "documents is 24, with.manifest.idx has 23"),
        (lambda value: value.update(sequences=24), "sequences is 24, with.manifest.idx has 46"),
        (lambda value: value.update(dtype="int16"), "dtype is int16, with.manifest.idx has uint16"),
    ],
)
def test_bad_manifest_is_refused_by_field(store_with_manifest, change, message):
    IndexedDataset(store_with_manifest)  # control
    change_manifest(store_with_manifest, change)
    with pytest.raises(DataFileError, match=rf"with\.manifest\.json: .*{message}"):
        IndexedDataset(store_with_manifest)


MEANINGS = {
    "crop": lambda value: value["image"].update(crop="random"),
    "precision": lambda value: value["image"].update(encoder_precision="bfloat16"),
    "grid": lambda value: value["image"].update(grid=[4, 2]),
    "ids": lambda value: value["text"].update(max_id=200),
    "codes": lambda value: value["image"].update(min_code=1),
    "kind": lambda value: value["image"].update(kind="movqgan"),
    "tokenizer": lambda value: value["text"].update(sha256="0" * 64),
    "source": lambda value: value["sources"][0].update(name="elsewhere"),
    "block": lambda value: value["bin_blocks"].update(block_bytes=2**20),
    "digest": lambda value: value.update(sha256="0" * 64),
    "no digest": lambda value: value.pop("sha256"),
}


@pytest.mark.parametrize("change", MEANINGS.values(), ids=MEANINGS)
def test_what_the_ids_mean_cannot_change_unseen(store_with_manifest, change):
    change_manifest(store_with_manifest, lambda value: None, sign=False)  # control: white space is no meaning
    IndexedDataset(store_with_manifest)
    change_manifest(store_with_manifest, change, sign=False)
    with pytest.raises(DataFileError, match=r"with\.manifest\.json: its content is not what its own sha256"):
        IndexedDataset(store_with_manifest)


def test_no_changed_byte_gives_a_manifest_another_meaning(store_with_manifest):
    path, expected = Path(f"{store_with_manifest}.json"), Manifest.read(store_with_manifest)
    original = path.read_bytes()
    for at in range(len(original)):
        for bit in (1, 2, 16, 32):
            path.write_bytes(original[:at] + bytes([original[at] ^ bit]) + original[at + 1 :])
            try:
                assert Manifest.read(store_with_manifest) == expected
            except DataFileError:
                continue
    path.write_bytes(original)


def test_a_manifest_without_a_digest_of_itself_still_opens(store_with_manifest):
    expected = Manifest.read(store_with_manifest)
    change_manifest(store_with_manifest, as_older_format)
    assert IndexedDataset(store_with_manifest).manifest == expected
    expected.write(store_with_manifest)  # as every tool that changes it does
    assert "sha256" in json.loads(Path(f"{store_with_manifest}.json").read_text())


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_not_a_manifest(store_with_manifest, content):
    Path(f"{store_with_manifest}.json").write_bytes(content)
    with pytest.raises(DataFileError, match=r"with\.manifest\.json"):
        Manifest.read(store_with_manifest)


def test_every_flipped_byte_is_found(store_with_manifest):
    manifest = Manifest.read(store_with_manifest)
    index, tokens = Path(f"{store_with_manifest}.idx"), Path(f"{store_with_manifest}.bin")
    for at in range(index.stat().st_size):
        original = flip(index, at)
        with pytest.raises(DataFileError, match=r"with\.manifest\.idx: its SHA-256"):
            IndexedDataset(store_with_manifest)
        index.write_bytes(original)
    for at in range(tokens.stat().st_size):
        original = flip(tokens, at)
        IndexedDataset(store_with_manifest)  # control: opening alone does not read the tokens
        with pytest.raises(DataFileError, match=rf"with\.manifest\.bin: bytes 0 to {len(original) - 1} differ"):
            manifest.verify(store_with_manifest)
        manifest.verify(store_with_manifest, data=False)
        tokens.write_bytes(original)
    manifest.verify(store_with_manifest)


def test_error_names_the_damaged_block(store_with_manifest):
    blocks = digest_file(Path(f"{store_with_manifest}.bin"), block_bytes=100)
    manifest = dataclasses.replace(Manifest.read(store_with_manifest), bin_blocks=blocks)
    manifest.verify(store_with_manifest)
    path = Path(f"{store_with_manifest}.bin")
    for at, said in ((199, "100 to 199"), (200, "200 to 299"), (manifest.bin_bytes - 1, "600 to 609")):
        original = flip(path, at)
        with pytest.raises(DataFileError, match=f"bytes {said} differ"):
            manifest.verify(store_with_manifest)
        path.write_bytes(original)
    for sha256 in (blocks.sha256[:-1], (*blocks.sha256, "00")):
        wrong = dataclasses.replace(manifest, bin_blocks=BlockDigests(100, sha256))
        with pytest.raises(DataFileError, match=f"7 blocks, the manifest has digests of {len(sha256)}"):
            wrong.verify(store_with_manifest)


def test_cut_or_missing_files_are_refused(store_with_manifest):
    path = Path(f"{store_with_manifest}.bin")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataFileError, match=r"with\.manifest\.bin: 608 bytes, the manifest says 610"):
        IndexedDataset(store_with_manifest)
    path.unlink()
    with pytest.raises(DataFileError, match=r"with\.manifest\.bin: not found"):
        IndexedDataset(store_with_manifest)
    Path(f"{store_with_manifest}.idx").unlink()
    with pytest.raises(DataFileError, match=r"with\.manifest\.idx: not found"):
        IndexedDataset(store_with_manifest)


def test_digests_do_not_depend_on_how_the_bytes_arrive(tmp_path):
    data = bytes(range(256)) * 5
    (tmp_path / "f").write_bytes(data)
    for step in (1, 7, 100, 1280):
        digester = BlockDigester(100)
        for start in range(0, len(data), step):
            digester.update(data[start : start + step])
        assert digester.result() == digest_file(tmp_path / "f", 100)
    assert len(digester.result().sha256) == 13
    assert BlockDigester(100).result() == BlockDigests(100, ())
    whole = BlockDigester(100)
    whole.update(data[::-1])
    assert whole.result() != digester.result()
