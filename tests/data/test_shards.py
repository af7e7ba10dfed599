"""Tar shards and Parquet files: whole parts, hostile members refused, damage reported, nothing extracted."""

import errno
import io
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_layouts import (
    PICTURES,
    png,
    read,
    reasons,
    write_parquet,
    write_tar,
)

from megat2i.data import shards
from megat2i.data.images import UnreadableImage
from megat2i.data.samples import Refused, Sample
from megat2i.data.sources import find_parts
from megat2i.files import DataFileError


def test_parquet_parts_are_whole_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr("megat2i.data.shards.BLOCK", 3)
    parts = find_parts([write_parquet(tmp_path / "a.parquet")], "train")
    assert [(part.first, part.last, part.row, part.expected) for part in parts] == [(0, 2, 0, 4), (2, 3, 4, 1)]
    assert [sample.name for part in parts for sample in part.samples()] == [f"row {row}" for row in range(5)]


def add(archive, name, content=b"", **attributes):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in attributes.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


def test_hostile_members_of_a_tar_are_refused_and_nothing_is_extracted(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    shard = tmp_path / "in" / "a.tar"
    shard.parent.mkdir()
    with tarfile.open(shard, "w") as archive:
        add(archive, "folder", type=tarfile.DIRTYPE)
        add(archive, "../../x.png", png("red"))
        add(archive, "/absolute.png", png("red"))
        add(archive, "link.txt", type=tarfile.SYMTYPE, linkname="../secret.txt")
        add(archive, "link.png", type=tarfile.LNKTYPE, linkname="good.png")
        add(archive, "device.png", type=tarfile.CHRTYPE)
        add(archive, "n" * 5000 + ".png", png("red"))
        add(archive, ".DS_Store", b"left by a file manager")
        add(archive, "._good.png", png("red"))
        add(archive, "good.png", png("blue"))
        add(archive, "good.txt", b"a good one")
    before = sorted(tmp_path.rglob("*"))
    found = read([str(shard)])
    assert [(sample.name, sample.caption) for sample in found if isinstance(sample, Sample)] == [("good", "a good one")]
    special, outside = "a link, device or other special member", "a name that points outside of the archive"
    assert reasons([str(shard)]) == {
        "../../x.png": outside,
        "/absolute.png": outside,
        "link.txt": special,
        "link.png": special,
        "device.png": special,
        "n" * 1024: "a name of 5,004 characters",
        ".DS_Store": "a hidden file",
        "._good.png": "a hidden file",
    }
    assert sorted(tmp_path.rglob("*")) == before and not (tmp_path.parent / "x.png").exists()


def test_incomplete_samples_of_a_tar(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        add(archive, "0.png", png("red"))
        add(archive, "1.txt", b"no image")
        add(archive, "2.png", png("red"))
        add(archive, "2.json", b"[[")
        add(archive, "3.png", png("red"))
        add(archive, "3.txt", b"x" * (2**20 + 1))
        add(archive, "4.JPG", png("red"))
        add(archive, "4.json", b'{"caption": "upper case"}')
    found = reasons([str(tmp_path / "a.tar")])
    assert found["0"] == "no caption: neither .txt nor .json"
    assert found["1"] == "no image: its files are .txt"
    assert "Expecting" in found["2"] and "more than 1,048,576" in found["3"]
    assert [sample.caption for sample in read([str(tmp_path / "a.tar")]) if isinstance(sample, Sample)] == [
        "upper case"
    ]


def good_before(tar_path):
    """(captions before the damage, refused ones) of a damaged archive."""
    found = read([str(tar_path)])
    return [one.caption for one in found if isinstance(one, Sample)], [one for one in found if isinstance(one, Refused)]


def test_a_damaged_header_ends_a_tar_with_a_ledger_line(tmp_path):
    """Python's tarfile takes it for the end of the archive and says nothing."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, (caption, colour) in enumerate(PICTURES):
            add(archive, f"{number}.png", png(colour))
            add(archive, f"{number}.txt", caption.encode())
    assert reasons([str(path)]) == {}
    content = bytearray(path.read_bytes())
    content[content.index(b"3.png")] ^= 0x55
    path.write_bytes(content)
    with tarfile.open(path) as archive:  # the control
        assert archive.getnames()[-1] == "2.txt"
    captions, refused = good_before(path)
    assert captions == ["picture 0", "picture 1", "picture 2"]
    assert refused == [Refused("after 2.txt", "the archive is damaged or cut off here")]


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.62, 0.8])
def test_a_cut_off_tar_keeps_what_is_whole(tmp_path, keep):
    path = Path(write_tar(tmp_path / "a.tar"))
    end = path.read_bytes().rindex(b"000000004") + 2048
    path.write_bytes(path.read_bytes()[: int(end * keep)])
    captions, refused = good_before(path)
    assert captions == [caption for caption, _ in PICTURES][: len(captions)] and len(captions) < 5
    assert any("damaged" in one.reason or "cut off" in one.reason or "ends inside" in one.reason for one in refused)


def test_a_whole_tar_is_not_called_damaged(tmp_path):
    assert reasons([write_tar(tmp_path / "a.tar")]) == {}


def test_a_tar_header_with_a_negative_size_does_not_run_in_circles(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "0.png", png("red"))
        add(archive, "0.txt", b"caption")
    content = bytearray(path.read_bytes())
    at = content.index(b"0.txt")
    header = tarfile.TarInfo("0.txt")
    header.size = -(at + 512)
    content[at : at + 512] = header.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(content)
    assert any("damaged" in reason for reason in reasons([str(path)]).values())


def test_bad_rows_of_a_parquet_file(tmp_path):
    path = tmp_path / "a.parquet"
    images = [png("red"), None, b"not an image", png("red")]
    pq.write_table(pa.table({"image": images, "caption": ["fine", "no bytes", "broken", None]}), path)
    assert reasons([str(path)]) == {"row 3": "no caption"}
    usable = [sample for sample in read([str(path)]) if isinstance(sample, Sample)]
    for sample, problem in zip(usable[1:], ("no image bytes", "not a JPEG"), strict=True):
        with pytest.raises(UnreadableImage, match=problem):
            sample.image(8)


def test_damaged_parquet_pages_are_one_ledger_line(tmp_path):
    path = Path(write_parquet(tmp_path / "a.parquet"))
    content = bytearray(path.read_bytes())
    content[4:400] = bytes(396)
    path.write_bytes(content)
    found = reasons([str(path)])
    assert found and all("damaged here" in reason for reason in found.values())


@pytest.mark.parametrize("damage", ["2,000 names", "a name of 2^45 bytes"])
def test_headers_that_exhaust_the_reader_are_damage(tmp_path, damage):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        add(archive, "0.png", png("red"))
        add(archive, "0.txt", b"caption")
        end = archive.offset
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 2 if damage == "2,000 names" else 2**45
    headers = (name.tobuf(tarfile.GNU_FORMAT) + b"a".ljust(512, bytes(1))) * 2000
    path.write_bytes(path.read_bytes()[:end] + headers + bytes(1024))
    captions, refused = good_before(path)
    assert captions == ["caption"] and [one.name for one in refused] == ["after 0.txt"]
    assert "the archive is damaged here" in refused[0].reason
    path.write_bytes(headers)
    with pytest.raises(DataFileError, match="not a readable tar archive"):
        find_parts([str(path)], "train")


@pytest.mark.parametrize("place", ["header", "caption", "image"])
def test_storage_that_fails_while_a_tar_is_read_is_no_fault_of_the_sample(tmp_path, monkeypatch, place):
    (part,) = find_parts([write_tar(tmp_path / "a.tar")], "train")

    def fail(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    samples = part.samples()
    if place == "image":
        samples = [next(samples)]
    with monkeypatch.context() as patch, pytest.raises(DataFileError, match=r"a\.tar: the storage failed .*Stale"):
        if place == "header":
            patch.setattr(shards._SharedFile, "read", fail)
        else:
            patch.setattr(os, "pread", fail)
        for sample in samples:
            sample.image(8)
    assert next(part.samples()).image(8).size


def test_tars_and_parquet_files_that_cannot_be_opened_for_now(tmp_path, few_files):
    parts = find_parts([write_tar(tmp_path / "a.tar"), write_parquet(tmp_path / "a.parquet")], "train")
    for part in parts:
        with few_files(), pytest.raises(DataFileError, match="Too many open files"):
            list(part.samples())
