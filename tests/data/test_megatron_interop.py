"""Token files are exchanged with the real megatron-core in both directions: same content, same bytes of the .idx."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from megat2i.data.indexed import IndexedDataset, IndexedWriter
from megat2i.data.merge import merge
from megat2i.data.t2i_dataset import T2IDataset
from megat2i.vocab import VocabLayout

DTYPES = [np.uint16, np.int32, np.uint8, np.int64]


@pytest.fixture(scope="module")
def megatron():
    if importlib.util.find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed (pip install 'megat2i[test]')")
    import megatron.core.datasets.indexed_dataset as module  # several seconds

    return module


def documents_for(dtype) -> list[list[np.ndarray]]:
    """Documents of a caption and an image that reach both ends of the dtype; a caption may be empty."""
    limits, generator = np.iinfo(dtype), np.random.default_rng(0)
    documents = [
        [generator.integers(0, 100, length), generator.integers(0, 200, 16)] for length in (3, 0, 12, 1, 7, 7, 2)
    ]
    documents[2][1][:2] = [limits.min, limits.max]
    return [[tokens.astype(dtype) for tokens in document] for document in documents]


def write_ours(prefix, documents, dtype) -> None:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document, [0, 1])


def write_theirs(megatron, prefix, documents, dtype, multimodal: bool) -> None:
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, multimodal=multimodal)
    for document in documents:
        for mode, tokens in enumerate(document):
            if multimodal:
                builder.add_item(torch.from_numpy(tokens.astype(np.int64)), mode)
            else:
                builder.add_item(torch.from_numpy(tokens.astype(np.int64)))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def content(store, with_modes: bool):
    """Everything that a store of ours or of megatron-core says, as plain values."""
    if isinstance(store, IndexedDataset):
        sequences = [store.sequence(i) for i in range(len(store))]
        lengths, documents, modes, dtype = store.lengths, store.documents, store.modes, store.dtype
    else:
        sequences = [store[i][0] if with_modes else store[i] for i in range(len(store))]
        lengths, documents, modes = store.sequence_lengths, store.document_indices, store.index.sequence_modes
        dtype = np.dtype(store.index.dtype)
        if with_modes:
            assert [store[i][1] for i in range(len(store))] == modes.tolist()
    return (
        [tokens.tolist() for tokens in sequences],
        lengths.tolist(),
        documents.tolist(),
        modes.tolist() if with_modes else None,
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_megatron_reads_ours(megatron, tmp_path, dtype):
    documents = documents_for(dtype)
    write_ours(tmp_path / "ours", documents, dtype)
    ours = IndexedDataset(tmp_path / "ours")
    for multimodal in (True, False):
        theirs = megatron.IndexedDataset(str(tmp_path / "ours"), multimodal=multimodal)
        assert content(theirs, multimodal) == content(ours, multimodal)
    assert content(ours, True)[0] == [tokens.tolist() for document in documents for tokens in document]
    # Control: the comparison sees one changed token.
    data = bytearray(Path(tmp_path / "ours.bin").read_bytes())
    data[0] ^= 1
    Path(tmp_path / "ours.bin").write_bytes(data)
    changed = megatron.IndexedDataset(str(tmp_path / "ours"), multimodal=True)
    assert content(changed, True) != ([t.tolist() for d in documents for t in d], *content(ours, True)[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bytes_as_megatrons_builder(megatron, tmp_path, dtype):
    documents = documents_for(dtype)
    write_ours(tmp_path / "ours", documents, dtype)
    write_theirs(megatron, tmp_path / "theirs", documents, dtype, multimodal=True)
    for suffix in (".idx", ".bin"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    # Merging equals its add_index.
    merge([tmp_path / "ours", tmp_path / "theirs"], tmp_path / "merged", len)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "added.bin"), dtype=dtype, multimodal=True)
    for name in ("ours", "theirs"):
        builder.add_index(str(tmp_path / name))
    builder.finalize(str(tmp_path / "added.idx"))
    for suffix in (".idx", ".bin"):
        assert (tmp_path / f"merged{suffix}").read_bytes() == (tmp_path / f"added{suffix}").read_bytes()


@pytest.mark.parametrize("multimodal", [True, False])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_we_read_megatrons(megatron, tmp_path, dtype, multimodal):
    documents = documents_for(dtype)
    write_theirs(megatron, tmp_path / "theirs", documents, dtype, multimodal)
    ours = IndexedDataset(tmp_path / "theirs")
    theirs = megatron.IndexedDataset(str(tmp_path / "theirs"), multimodal=multimodal)
    assert (ours.modes is not None) == multimodal
    assert content(ours, multimodal) == content(theirs, multimodal)


def test_text_of_megatron_trains(megatron, tmp_path):
    """The usual text file of Megatron, one sequence a document and no modes, gives windows of its flat stream."""
    documents = [[np.arange(start, start + 30)] for start in (0, 100, 200)]
    write_theirs(megatron, tmp_path / "text", documents, np.int32, multimodal=False)
    dataset = T2IDataset(tmp_path / "text", VocabLayout(300, 64), 16, "text_only")
    assert dataset.row(1, 0).tokens.tolist() == [*range(16, 30), 100, 101] and len(dataset) == 5
