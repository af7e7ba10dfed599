"""Merging token stores is concatenation; what does not fit together, or is damaged, is refused without a trace."""

import errno
import hashlib
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from captioned_images import locked
from manifest_file import change_manifest

from megat2i.data.codebook_use import CodebookUse
from megat2i.data.indexed import IndexedDataset, IndexedWriter
from megat2i.data.manifest import Manifest, Source, digest_file
from megat2i.data.merge import merge, merge_datasets
from megat2i.files import DataFileError


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_merge_is_concatenation(tmp_path, write_store, make_documents):
    parts = [make_documents(count, seed) for seed, count in enumerate((3, 0, 5))]
    for number, documents in enumerate(parts):
        write_store(tmp_path / f"part{number}", documents, manifest=number == 2)
    digests = merge([tmp_path / f"part{number}" for number in range(3)], tmp_path / "merged", len)
    write_store(tmp_path / "whole", parts[0] + parts[2])
    for suffix in (".idx", ".bin"):
        assert (tmp_path / f"merged{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()
    assert digests.index_sha256 == hashlib.sha256((tmp_path / "merged.idx").read_bytes()).hexdigest()
    assert digests.bin_blocks == digest_file(tmp_path / "merged.bin")
    assert not [name for name in files_of(tmp_path) if name.endswith(".tmp")]


def test_merge_without_modes(tmp_path, write_without_modes):
    write_without_modes(tmp_path / "a", [1, 2, 3], lengths=[2, 1])
    write_without_modes(tmp_path / "b", [4], lengths=[1])
    write_without_modes(tmp_path / "whole", [1, 2, 3, 4], lengths=[2, 1, 1])
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c", len)
    for suffix in (".idx", ".bin"):
        assert (tmp_path / f"c{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


def test_merge_refuses_what_does_not_fit(
    tmp_path, store, store_with_manifest, write_store, make_documents, write_without_modes
):
    write_store(tmp_path / "wide", make_documents(2), dtype="int32")
    write_without_modes(tmp_path / "nomodes", [1], lengths=[1])
    with pytest.raises(DataFileError, match="complete already"):
        merge([store], store_with_manifest, len)
    for prefixes, message in (
        ([store, tmp_path / "wide"], "dtype is int32, that of .* is uint16"),
        ([store, tmp_path / "nomodes"], "only some of the stores have modes"),
        ([], "no stores to merge"),
    ):
        before = files_of(tmp_path)
        with pytest.raises(DataFileError, match=message):
            merge(prefixes, tmp_path / "out", len)
        assert files_of(tmp_path) == before


def test_merge_refuses_damaged_tokens(tmp_path, store, store_with_manifest):
    path = Path(f"{store_with_manifest}.bin")
    data = path.read_bytes()
    merge([store, store_with_manifest], tmp_path / "out", len)  # control
    assert len(IndexedDataset(tmp_path / "out")) == 92
    path.write_bytes(data[:33] + bytes([data[33] ^ 4]) + data[34:])
    (tmp_path / "out.bin").unlink()
    with pytest.raises(DataFileError, match=r"with\.manifest\.bin: bytes 0 to .* differ"):
        merge([store, store_with_manifest], tmp_path / "out", len)
    assert "out.bin" not in files_of(tmp_path)


def test_more_stores_than_a_process_may_hold_open(tmp_path):
    """A folder of 128,000 images makes 500 parts; two open files for each would pass the usual limit of 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    prefixes = [tmp_path / f"part-{number}" for number in range(60)]
    for number, prefix in enumerate(prefixes):
        with IndexedWriter(prefix, np.uint16) as writer:
            writer.add_document([np.array([number], np.uint16)], [0])
    resource.setrlimit(resource.RLIMIT_NOFILE, (50, hard))
    try:
        merge(prefixes, tmp_path / "all", len)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [int(IndexedDataset(tmp_path / "all").sequence(n)[0]) for n in range(60)] == list(range(60))


# Datasets: stores with manifests, ledgers and reports


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda value: value["text"].update(sha256="ef"), "text.sha256 is ef, in .*a.json it is ab"),
        (lambda value: value["image"].update(sha256="ef"), "image.sha256 is ef"),
        (lambda value: value["image"].update(crop="pad"), "image.crop is pad"),
        (lambda value: value["image"].update(encoder_precision="bfloat16"), "image.encoder_precision is bfloat16"),
        (lambda value: value["image"].update(image_size=32), "image.image_size is 32"),
        (lambda value: value["text"].update(vocab_size=301), "text.vocab_size is 301"),
        (lambda value: value.update(dtype="int32"), "dtype is int32"),
        (lambda value: value.update(text=None), "not a dataset of captions and images"),
        (None, "no finished dataset has this prefix"),
    ],
)
def test_datasets_that_differ_are_refused_by_the_field(tmp_path, write_store, make_documents, change, field):
    for name in "ab":
        write_store(tmp_path / name, make_documents(3, ord(name)), manifest=True)
    merge_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "control", overwrite=False)
    before = files_of(tmp_path)
    if change is None:
        (tmp_path / "b.json").rename(tmp_path / "kept")
    else:
        change_manifest(tmp_path / "b", change)
    with pytest.raises(DataFileError, match=field):
        merge_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "out", overwrite=False)
    assert files_of(tmp_path) - {"kept"} == before - ({"b.json"} if change is None else set())


def test_merged_manifest_ledger_and_counts(tmp_path, write_store, make_documents):
    documents = {name: make_documents(4, seed) for seed, name in enumerate("abc")}
    (tmp_path / "out").mkdir()
    for name in "abc":
        later = {"sources": (Source("a.jsonl", 4),)} if name == "b" else {}  # a later piece of the source of "a"
        write_store(tmp_path / name, documents[name], manifest=True, **later)
        if name != "b":
            Path(f"{tmp_path / name}.ledger.jsonl").write_text(f"{name}\n")
    prefixes, output = [tmp_path / name for name in "abc"], tmp_path / "out" / "all"
    manifest = merge_datasets(prefixes, output, overwrite=False)
    manifest.verify(output)
    both = sum(documents.values(), [])
    write_store(tmp_path / "whole", both, manifest=True)
    whole = Manifest.read(tmp_path / "whole")
    for field in ("documents", "sequences", "tokens", "dtype", "index_sha256", "bin_blocks"):
        assert getattr(manifest, field) == getattr(whole, field), field
    assert manifest.sources == (Source("a.jsonl", 8, size=12), Source("a.jsonl", 4, size=12))
    assert (manifest.text.min_id, manifest.text.max_id) == (whole.text.min_id, whole.text.max_id)
    assert (manifest.image.min_code, manifest.image.max_code) == (whole.image.min_code, whole.image.max_code)
    assert (manifest.text.tokenizer, manifest.image.tokenizer) == ("../t.json", "../p")
    assert Path(f"{output}.ledger.jsonl").read_text() == "a\nc\n"
    counts = np.bincount(np.concatenate([image for _, image in both]), minlength=64)
    assert np.array_equal(CodebookUse.read(output, 64).counts, counts)  # counted: the datasets have no reports
    assert merge_datasets([output, tmp_path / "a"], tmp_path / "more", overwrite=False).documents == 16
    assert np.array_equal(
        CodebookUse.read(tmp_path / "more", 64).counts,
        counts + np.bincount(np.concatenate([image for _, image in documents["a"]]), minlength=64),
    )
    with pytest.raises(DataFileError, match="there is a complete dataset"):
        merge_datasets(prefixes, output, overwrite=False)
    with pytest.raises(DataFileError, match="is also one of the datasets to merge"):
        merge_datasets([output], output, overwrite=True)
    merge_datasets(prefixes[:1], output, overwrite=True)
    assert IndexedDataset(output).number_of_documents == 4


def test_an_input_is_never_the_output_whatever_it_is_called(tmp_path, write_store, make_documents, monkeypatch):
    (tmp_path / "d").mkdir()
    (tmp_path / "link").symlink_to("d")
    for name in "ab":
        write_store(tmp_path / "d" / name, make_documents(3), manifest=True)
    before = Path(tmp_path / "d" / "a.json").read_bytes()
    monkeypatch.chdir(tmp_path)
    for same in ("d/a", "link/a", f"{tmp_path}/d/../d/a"):
        with pytest.raises(DataFileError, match="is also one of the datasets to merge"):
            merge_datasets([tmp_path / "d" / "a", tmp_path / "d" / "b"], Path(same), overwrite=True)
        assert (tmp_path / "d" / "a.json").read_bytes() == before


def test_a_merge_that_fails_leaves_the_old_dataset_whole(tmp_path, write_store, make_documents):
    for number, name in enumerate(("a", "b", "out")):
        write_store(tmp_path / name, make_documents(3, number), manifest=True)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("out.*")}
    data = (tmp_path / "b.bin").read_bytes()
    (tmp_path / "b.bin").write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(DataFileError, match=r"b\.bin: bytes 0 to"):
        merge_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "out", overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("out*")} == before
    (tmp_path / "b.bin").write_bytes(data)
    merge_datasets([tmp_path / "a", tmp_path / "b"], tmp_path / "out", overwrite=True).verify(tmp_path / "out")


def test_merges_exclude_each_other_and_remove_what_killed_ones_left(tmp_path, write_store, make_documents):
    write_store(tmp_path / "a", make_documents(3), manifest=True)
    stray = tmp_path / "out.bin.7-ab.tmp"
    stray.touch()
    with locked(tmp_path / "out.parts"), pytest.raises(DataFileError, match="another run is writing this dataset"):
        merge_datasets([tmp_path / "a"], tmp_path / "out", overwrite=False)
    assert stray.exists()
    merge_datasets([tmp_path / "a"], tmp_path / "out", overwrite=False)
    assert not stray.exists() and not (tmp_path / "out.parts").exists()


def test_a_full_disk_is_one_error_that_names_the_file(tmp_path, store, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.copy_file_range", full)
    monkeypatch.setattr("os.sendfile", full)
    with pytest.raises(DataFileError, match=r"out\.bin: the storage failed .No space.* Free space"):
        merge([store], tmp_path / "out", len)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("cross", [False, True])
def test_the_kernel_copies_also_where_ranges_cannot_be_shared(tmp_path, store, monkeypatch, cross):
    if cross:  # what Linux says between some file systems

        def refuse(*_):
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr("os.copy_file_range", refuse)
    merge([store, store], tmp_path / "twice", len)
    assert (tmp_path / "twice.bin").read_bytes() == 2 * Path(f"{store}.bin").read_bytes()


@pytest.mark.full
def test_memory_does_not_grow_with_the_rows(repository, tmp_path):
    """Of 1 million rows: every step within 64 MB of what it takes without them; their index alone has 34 MB."""
    command = [sys.executable, repository / "benchmarks" / "bench_scale.py", "--rows", "10000", "1000000"]
    subprocess.run([*command, "--json", tmp_path / "out.json", "--folder", tmp_path], check=True, timeout=1200)
    rows = json.loads((tmp_path / "out.json").read_text())
    assert len(rows) == 10 and max(row["anonymous_mb"] for row in rows) < 64
    growth = {(row["step"], row["rows"]): row["peak_rss_growth_mb"] for row in rows}
    assert growth["merge shards", 1_000_000] < 64 and growth["merge shards", 10_000] > 1
    assert growth["open the index", 1_000_000] < 25 and growth["open the rows", 1_000_000] < 25
