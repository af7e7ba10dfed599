"""Small token stores for the tests of the data part."""

import importlib.util
import resource
import struct
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from captioned_images import TOOL

from megat2i.data.indexed import IndexedWriter
from megat2i.data.manifest import ImageContent, Manifest, Source, TextContent, TokenCounts

TEXT_TOKENS, IMAGE_CODES, GRID = 300, 64, (2, 4)


def make_documents(count: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of a caption of 0 to 9 text ids and an image of 8 codes."""
    generator = np.random.default_rng(seed)
    codes = GRID[0] * GRID[1]
    return [
        (generator.integers(0, TEXT_TOKENS, generator.integers(0, 10)), generator.integers(0, IMAGE_CODES, codes))
        for _ in range(count)
    ]


def write_store(prefix, documents, dtype=np.uint16, manifest: bool = False, **changed) -> None:
    """Write text and image pairs; ``changed`` replaces fields of the manifest."""
    with IndexedWriter(prefix, dtype) as writer:
        for text, image in documents:
            writer.add_document([text, image], [0, 1])
    if manifest:
        texts = np.concatenate([text for text, _ in documents])
        images = np.concatenate([image for _, image in documents])
        fields = {
            "documents": len(documents),
            "sequences": 2 * len(documents),
            "tokens": TokenCounts(len(texts), len(images)),
            "dtype": np.dtype(dtype).name,
            "text": TextContent(TEXT_TOKENS, int(texts.min()), int(texts.max()), "t.json", "bpe", "ab"),
            "image": ImageContent(
                IMAGE_CODES, int(images.min()), int(images.max()), GRID, 16, "center", "float32", "p", "patch", "cd"
            ),
            "sources": (Source("a.jsonl", len(documents), size=12),),
            "index_sha256": writer.digests.index_sha256,
            "bin_blocks": writer.digests.bin_blocks,
        }
        Manifest(**{**fields, **changed}).write(prefix)


def write_without_modes(prefix, tokens, lengths, dtype: str = "<u2"):
    """A store as Megatron writes text: one sequence a document, no modes. By the published layout, not our writer."""
    tokens, lengths = np.asarray(tokens, dtype), np.asarray(lengths, "<i4")
    ends = np.cumsum(lengths, dtype="<i8") * tokens.itemsize
    code = {"<u2": 8, "<i4": 4}[dtype]
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1)
    pointers, documents = ends - lengths * tokens.itemsize, np.arange(len(lengths) + 1, dtype="<i8")
    Path(f"{prefix}.idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + documents.tobytes())
    Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
    return prefix


@pytest.fixture
def pairs():
    return make_documents(23)


@pytest.fixture
def store(tmp_path, pairs):
    """Prefix of a store of 23 documents without a manifest."""
    write_store(tmp_path / "plain", pairs)
    return tmp_path / "plain"


@pytest.fixture
def store_with_manifest(tmp_path, pairs):
    """Prefix of the same store with a manifest."""
    write_store(tmp_path / "with.manifest", pairs, manifest=True)
    return tmp_path / "with.manifest"


@pytest.fixture(name="write_store")
def write_store_fixture():
    return write_store


@pytest.fixture(name="write_without_modes")
def write_without_modes_fixture():
    return write_without_modes


@pytest.fixture(name="make_documents")
def make_documents_fixture():
    return make_documents


@pytest.fixture
def command_line(monkeypatch):
    """``main`` of tools/preprocess_data.py, called with arguments, in this process."""
    spec = importlib.util.spec_from_file_location("preprocess_data", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["preprocess_data.py", *map(str, arguments)])
        module.main()

    yield call
    torch.set_num_threads(threads)


@pytest.fixture
def few_files():
    """A context in which this process can open no file: storage that is at its limit."""

    @contextmanager
    def limit():
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    return limit
