"""Merging token stores is concatenation; what does not fit together, or is damaged, is refused without a trace."""

import hashlib
import resource
from pathlib import Path

import numpy as np
import pytest

from megat2i.data.indexed import IndexedDataset, IndexedWriter, merge
from megat2i.data.manifest import digest_file
from megat2i.files import DataFileError


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_merge_is_concatenation(tmp_path, write_store, make_documents):
    parts = [make_documents(count, seed) for seed, count in enumerate((3, 0, 5))]
    for number, documents in enumerate(parts):
        write_store(tmp_path / f"part{number}", documents, manifest=number == 2)
    digests = merge([tmp_path / f"part{number}" for number in range(3)], tmp_path / "merged")
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
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    for suffix in (".idx", ".bin"):
        assert (tmp_path / f"c{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


def test_merge_refuses_what_does_not_fit(
    tmp_path, store, store_with_manifest, write_store, make_documents, write_without_modes
):
    write_store(tmp_path / "wide", make_documents(2), dtype="int32")
    write_without_modes(tmp_path / "nomodes", [1], lengths=[1])
    with pytest.raises(DataFileError, match="complete already"):
        merge([store], store_with_manifest)
    for prefixes, message in (
        ([store, tmp_path / "wide"], "dtype is int32, that of .* is uint16"),
        ([store, tmp_path / "nomodes"], "only some of the stores have modes"),
        ([], "no stores to merge"),
    ):
        before = files_of(tmp_path)
        with pytest.raises(DataFileError, match=message):
            merge(prefixes, tmp_path / "out")
        assert files_of(tmp_path) == before


def test_merge_refuses_damaged_tokens(tmp_path, store, store_with_manifest):
    path = Path(f"{store_with_manifest}.bin")
    data = path.read_bytes()
    merge([store, store_with_manifest], tmp_path / "out")  # control
    assert len(IndexedDataset(tmp_path / "out")) == 92
    path.write_bytes(data[:33] + bytes([data[33] ^ 4]) + data[34:])
    (tmp_path / "out.bin").unlink()
    with pytest.raises(DataFileError, match=r"with\.manifest\.bin: bytes 0 to .* differ"):
        merge([store, store_with_manifest], tmp_path / "out")
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
        merge(prefixes, tmp_path / "all")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [int(IndexedDataset(tmp_path / "all").sequence(n)[0]) for n in range(60)] == list(range(60))
