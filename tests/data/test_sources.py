"""Sources: every layout yields the same samples; bad ones are refused with a reason and end nothing."""

import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from source_layouts import (
    PICTURES,
    read,
    reasons,
    write_folder,
    write_jsonl,
    write_metadata_folder,
    write_parquet,
    write_tar,
)

from megat2i.data import samples as samples_module
from megat2i.data.images import UnreadableImage
from megat2i.data.samples import Sample
from megat2i.data.sources import describe_source, find_parts
from megat2i.files import DataFileError


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: write_folder(folder / "f"),
        lambda folder: write_metadata_folder(folder / "m"),
        lambda folder: write_jsonl(folder / "a.jsonl"),
        lambda folder: write_jsonl(folder / "a.jsonl", ("file_name", "text")),
        lambda folder: write_tar(folder / "a.tar"),
        lambda folder: write_tar(folder / "a.tar", caption_as="json"),
        lambda folder: write_parquet(folder / "a.parquet"),
        lambda folder: write_parquet(folder / "a.parquet", "image_bytes", "TEXT", structure=False),
        lambda folder: write_parquet(folder / "a.parquet", "jpg", "text", structure=False),
    ],
    ids=["folder", "metadata", "jsonl", "jsonl-hf", "tar-txt", "tar-json", "parquet", "parquet-TEXT", "parquet-jpg"],
)
def test_every_layout_yields_the_same_samples(tmp_path, write):
    found = []
    for part in find_parts([write(tmp_path)], "train"):
        assert part.expected is None or part.expected == len(list(part.samples()))
        found += [(sample.caption, sample.image(8).getpixel((3, 3))) for sample in part.samples()]
    assert sorted(found) == PICTURES


@pytest.mark.parametrize("write", [write_folder, lambda folder: write_jsonl(folder / "a.jsonl")])
def test_parts_are_blocks_that_keep_order(tmp_path, write, monkeypatch):
    (tmp_path / "in").mkdir()
    text = write(tmp_path / "in")
    whole = [(sample.name, sample.caption) for sample in read([text])]
    monkeypatch.setattr("megat2i.data.sources.BLOCK", 2)
    parts = find_parts([text], "train")
    assert [part.expected for part in parts] == [2, 2, 1]
    assert [(sample.name, sample.caption) for part in parts for sample in part.samples()] == whole
    assert samples_module.BLOCK == 256


def test_openmoji_is_a_source_and_respects_the_split():
    train, valid = read(["openmoji"]), read(["openmoji"], "valid")
    assert not {sample.caption for sample in train} & {sample.caption for sample in valid}
    assert valid[0].image(32).size == (32, 32)
    assert describe_source("openmoji")[1] > 1_000_000


def test_several_inputs_follow_each_other(tmp_path):
    (tmp_path / "j").mkdir()
    both = read([write_tar(tmp_path / "a.tar"), write_jsonl(tmp_path / "j" / "b.jsonl")])
    assert [sample.caption for sample in both] == [caption for caption, _ in PICTURES] * 2


@pytest.mark.parametrize("change", ["image", "caption", "time"])
def test_identity_follows_the_files_of_a_folder(tmp_path, change):
    (part,) = find_parts([write_folder(tmp_path / "f")], "train")
    before = part.identity()
    assert before == find_parts([str(tmp_path / "f")], "train")[0].identity()
    if change == "image":
        (tmp_path / "f" / "2.png").write_bytes(b"other")
    elif change == "caption":
        (tmp_path / "f" / "2.txt").write_text("another caption")
    else:
        os.utime(tmp_path / "f" / "2.png", (1, 1))
    assert part.identity() != before


def test_identity_of_a_jsonl_part_follows_its_lines_and_images_only(tmp_path, monkeypatch):
    monkeypatch.setattr("megat2i.data.sources.BLOCK", 2)
    path = Path(write_jsonl(tmp_path / "a.jsonl"))
    before = [part.identity() for part in find_parts([str(path)], "train")]
    (tmp_path / "3.png").write_bytes(b"other")
    with open(path, "a") as file:
        file.write(json.dumps({"image": "0.png", "caption": "more"}) + "\n")
    after = [part.identity() for part in find_parts([str(path)], "train")]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, False]


# What cannot be used


def test_bad_captions_and_files_of_a_folder(tmp_path):
    folder = Path(write_folder(tmp_path / "f"))
    (folder / "0.txt").write_text(" \n\t")
    (folder / "2.txt").unlink()
    (folder / "4.txt").write_bytes(b"\xff\xfe")
    (folder / "deep" / "1.png").write_bytes(b"not an image")
    found = read([str(folder)])
    assert reasons([str(folder)]) == {
        "0.png": "empty caption",
        "2.png": "no caption: 2.txt: No such file or directory",
        "4.png": "the caption is not UTF-8",
    }
    usable = [sample for sample in found if isinstance(sample, Sample)]
    assert [sample.name for sample in usable] == ["deep/1.png", "deep/3.png"]
    with pytest.raises(UnreadableImage, match="not a JPEG, PNG or WebP"):
        usable[0].image(8)


def test_bad_lines_of_a_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    deep = b"[" * 100_000
    lines = [
        b'{"image": "0.png", "caption": "fine"}',
        b"{",
        b"[1]",
        b'{"caption": "no image"}',
        b'{"image": 7, "caption": "x"}',
        b'{"image": "0.png"}',
        b'{"image": "0.png", "caption": ["a", "b"]}',
        b'{"image": "0.png", "caption": "\\ud800"}',
        b'{"image": "a\\u0000b", "caption": "x"}',
        b'{"image": "0.png", "caption": "\xff"}',
        deep,
    ]
    path.write_bytes(b"\n".join(lines))
    found = reasons([str(path)])
    assert len(found) == len(lines) - 1
    expected = {
        "line 2": "Expecting",
        "line 3": "not a JSON object",
        "line 4": "no file name under image or file_name",
        "line 5": "no file name",
        "line 6: 0.png": "no caption",
        "line 7: 0.png": "the caption is list, not text",
        "line 8: 0.png": "not valid Unicode",
        "line 9": "no file name",
        "line 10": "codec can't decode",
        "line 11": "not JSON",
    }
    assert all(reason in found[name] for name, reason in expected.items())


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("none.tar", None, "no such file or folder"),
        ("a.zip", b"PK", "not an input that this tool knows"),
        ("a.tar", b"not a tar" * 200, "not a readable tar archive"),
        ("a.tar", b"", "not a readable tar archive"),
        ("a.parquet", b"PAR1", "not a readable Parquet file"),
        ("a.jsonl", b"\n \n", "an empty file"),
        ("folder/readme.md", b"", "no .jpg, .jpeg, .png, .webp file in this folder"),
    ],
)
def test_a_wrong_input_is_one_error_that_names_it(tmp_path, name, content, problem):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if content is not None:
        path.write_bytes(content)
    target = path.parent if "/" in name else path
    with pytest.raises(DataFileError, match=problem) as error:
        find_parts([str(target)], "train")
    assert str(target) in str(error.value)


def test_parquet_without_the_columns_is_one_error(tmp_path):
    pq.write_table(pa.table({"image": ["path.png"], "caption": ["image is text"]}), tmp_path / "a.parquet")
    with pytest.raises(DataFileError, match=r"its columns are image \(string\), caption \(string\)"):
        find_parts([str(tmp_path / "a.parquet")], "train")


@pytest.mark.parametrize("write", [write_folder, write_jsonl])
def test_files_that_cannot_be_opened_for_now_are_no_ledger_entries(tmp_path, few_files, write):
    (part,) = find_parts([write(tmp_path / "f.jsonl")], "train")
    with few_files(), pytest.raises(DataFileError, match="Too many open files"):
        list(part.samples())
    sample = next(part.samples())
    with few_files(), pytest.raises(DataFileError, match=r"\.png: the storage failed"):
        sample.image(8)


@pytest.mark.parametrize("value", [None, "", "  "])
def test_an_empty_caption_gives_way_to_the_other_key(tmp_path, value):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = {"image": "a.png", "caption": value, "text": "the other one"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"text": None}))
    (part,) = find_parts([str(tmp_path / "a.jsonl")], "train")
    first, second = part.samples()
    assert first.caption == "the other one" and second.reason in ("no caption", "empty caption")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        (tmp_path / "a.json").write_text(json.dumps(row))
        for name in ("a.png", "a.json"):
            archive.add(tmp_path / name, name)
    (part,) = find_parts([str(tmp_path / "a.tar")], "train")
    assert [sample.caption for sample in part.samples()] == ["the other one"]
