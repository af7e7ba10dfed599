"""Captions, lines and names that cost: refused one by one whatever their source, and the job goes on."""

import io
import json
import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from megat2i.data import sources
from megat2i.data.samples import LEDGER_TEXT, MAXIMUM_CAPTION_BYTES, Refused
from megat2i.data.shards import TarPart, check_tars, parquet_parts
from megat2i.data.sources import find_parts, folder_parts, jsonl_parts
from megat2i.files import DataFileError

LONG = "a" * (MAXIMUM_CAPTION_BYTES + 1)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


def outcomes(parts) -> list[str]:
    """Caption, or the reason of the refusal, of every sample."""
    return [one.reason if isinstance(one, Refused) else one.caption[:20] for part in parts for one in part.samples()]


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [png()] * 3, "caption": ["one", LONG, "three"]}), path)
    assert outcomes(parquet_parts(path)) == ["one", "a caption of 1,048,577 bytes, more than 1,048,576", "three"]


@pytest.mark.parametrize("schema", [True, False])
def test_a_dictionary_value_that_all_rows_share_is_in_memory_once(tmp_path, schema):
    path, size = tmp_path / "a.parquet", 8_000_000
    captions = pa.DictionaryArray.from_arrays(pa.array([0] * 600, pa.int32()), pa.array(["a" * size]))
    table = pa.table({"image": [b"x"] * 600, "caption": captions})
    pq.write_table(table, path, compression="zstd", store_schema=schema)
    assert os.path.getsize(path) < 10_000
    before, most, reasons = pa.total_allocated_bytes(), 0, set()
    for part in parquet_parts(path):
        for one in part.samples():
            most, reasons = max(most, pa.total_allocated_bytes() - before), reasons | {one.reason}
    assert reasons == {"a caption of 8,000,000 bytes, more than 1,048,576"} and most < 8 * size


def test_a_caption_column_of_lists_is_no_damage(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [png()], "caption": pa.array([["a"]])}), path)
    assert outcomes(parquet_parts(path)) == ["the caption is list, not text"]


def test_parquet_footers_that_are_not_utf8(tmp_path):
    """Each byte of the footer's column names changed: DataFileError or refused rows, no other exception."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [png()] * 5, "caption": ["a"] * 5}), path)
    content, changed = path.read_bytes(), tmp_path / "b.parquet"
    places = [at for name in (b"image", b"caption") for at in range(len(content)) if content.startswith(name, at)]
    raised = 0
    for at in places:
        changed.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
        try:
            outcomes(parquet_parts(changed))
        except DataFileError:
            raised += 1
    assert raised and len(places) > 3


def test_jsonl(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAXIMUM_LINE", 3 * MAXIMUM_CAPTION_BYTES)
    path = tmp_path / "a.jsonl"
    rows = [{"image": "a.png", "caption": caption} for caption in ("one", LONG, 4 * LONG, "four")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = jsonl_parts(path)
    reasons = ["a caption of 1,048,577 characters, more than 1,048,576", "more than 3,145,728 bytes"]
    assert outcomes(parts) == ["one", *reasons, "four"] and parts[0].expected == 4
    before = parts[0].identity()
    path.write_text(path.read_text().replace("one", "two"))
    assert parts[0].identity() != before


def test_folder(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.png").write_bytes(png())
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text(LONG)
    os.mkfifo(tmp_path / "c.txt")
    assert outcomes(folder_parts(tmp_path)) == ["one", "1,048,577 bytes, more than 1,048,576", "not a regular file"]


def write_tar(path, members):
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content, pax in members:
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(content), pax
            archive.addfile(member, io.BytesIO(content))


def test_a_key_with_thousands_of_members_is_one_short_refusal(tmp_path):
    path = tmp_path / "a.tar"
    good = [("b.png", png(), {}), ("b.txt", b"two", {})]
    write_tar(path, [*((f"a.x{number}", b"", {}) for number in range(2000)), *good])
    assert outcomes([TarPart(str(path))]) == ["more than 100 files", "two"]


def test_a_sparse_header_is_one_error_for_the_file(tmp_path):
    path = tmp_path / "a.tar"
    headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a", "GNU.sparse.realsize": "9"}
    write_tar(path, [("a.png", png(), headers)])
    with pytest.raises(DataFileError, match="not a readable tar archive"):
        check_tars(find_parts([str(path)], "train"))
    (one,) = TarPart(str(path)).samples()
    assert isinstance(one, Refused)


def test_names_and_reasons_are_short_in_the_ledger():
    row = Refused("n" * 10**6, "r" * 10**6).ledger_row("source")
    assert len(json.dumps(row)) < 3 * LEDGER_TEXT and row["sample"].startswith("nnn")
