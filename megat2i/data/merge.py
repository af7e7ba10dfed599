"""Finished stores joined into one dataset without looking at what their tokens mean.

The kernel copies the .bin files, on some file systems without moving a byte; of the indices only offsets change. Every
byte is read once for the digests: those of the store that it comes from and those of the new one. Stores are open one
at a time and the new index is collected in temporary files, so memory does not grow with the number of sequences.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from megat2i.data.codebook_use import CodebookUse
from megat2i.data.indexed import DTYPES, GrowingIndex, IndexedDataset, StoreDigests, commit_store
from megat2i.data.lengths import caption_lengths
from megat2i.data.manifest import REBUILD, BlockDigester, Manifest, Source, TokenCounts, relative_path
from megat2i.files import DataFileError, PendingFile, commit, only_run, storage_errors, store_path, write_file
from megat2i.progress import progress

COPY_BYTES = 1 << 22
SEQUENCES = 1 << 18  # whose entries of the index are changed at a time
FREE = ("documents", "sequences", "tokens", "sources", "index_sha256", "bin_blocks")  # what may differ in a merge
FREE += tuple(f"{content}.{name}" for content in ("text", "image") for name in ("tokenizer", "min_id", "max_id",
                                                                               "min_code", "max_code", "unknown",
                                                                               "captions"))  # fmt: skip


def merge(prefixes: Iterable[str | Path], output: str | Path, each: Callable, overwrite: bool = False) -> StoreDigests:
    """Concatenate stores of one dtype, in the order given, into a new one; returns the digests for its manifest.

    A complete store is replaced only with ``overwrite``, and stays whole until the new one is written. ``each`` is
    called with every store while it is open. Stores with and without modes do not mix. The bytes of a store that has a
    manifest are checked on their way.
    """
    manifest = store_path(output, ".json")
    if manifest.exists() and not overwrite:
        raise DataFileError(manifest, "the store is complete already", "Remove this file first")
    first, with_modes = None, None
    file, digester = PendingFile(store_path(output, ".bin")), BlockDigester()
    index = GrowingIndex(file.path.parent)
    try:
        with storage_errors(file.path), open(file.temporary, "r+b", buffering=0) as target:
            for prefix in progress(prefixes, f"merging into {output}", "datasets"):
                store = IndexedDataset(prefix)
                first = first or (store.dtype, store.index_path)
                if store.dtype != first[0]:
                    problem = f"its dtype is {store.dtype.name}, that of {first[1]} is {first[0].name}"
                    raise DataFileError(store.index_path, problem, "Merge stores of one dtype")
                if len(store):  # an empty store cannot tell whether it has modes
                    if with_modes not in (None, store.modes is not None):
                        raise DataFileError(store.index_path, "only some of the stores have modes", "Merge one kind")
                    with_modes = store.modes is not None
                _add_index(index, store)
                _add_tokens(target.fileno(), digester, store)
                each(store)
        if first is None:
            raise DataFileError(file.path, "no stores to merge", "Give at least one prefix")
        code = next(code for code, dtype in DTYPES.items() if dtype == first[0])
        return commit_store(file, digester, code, index)
    finally:
        index.close()
        file.discard()


def _add_index(index: GrowingIndex, store: IndexedDataset) -> None:
    for start in range(1, len(store.documents), SEQUENCES):
        index.documents.write((store.documents[start : start + SEQUENCES] + index.sequences).astype("<i8", copy=False))
    index.lengths.write(store.lengths)
    if store.modes is not None:
        index.modes.write(store.modes)


def _add_tokens(target: int, digester: BlockDigester, store: IndexedDataset) -> None:
    """Let the kernel copy the .bin to the file ``target``, and feed ``digester`` with it."""
    own = BlockDigester(store.manifest.bin_blocks.block_bytes) if store.manifest else None
    buffer, at = memoryview(bytearray(COPY_BYTES)), 0
    with open(store.bin_path, "rb", buffering=0) as source:
        while filled := os.preadv(source.fileno(), [buffer], at):
            for one in (digester, own) if own else (digester,):
                one.update(buffer[:filled])
            _copy(source.fileno(), target, filled)
            at += filled
    if at != store.token_count * store.dtype.itemsize or (own and own.result() != store.manifest.bin_blocks):
        if store.manifest:
            store.manifest.verify(store.prefix)  # names the bytes
        raise DataFileError(store.bin_path, "its bytes changed while they were read", REBUILD)


def _copy(source: int, target: int, size: int) -> None:
    """Append ``size`` bytes of the file ``source`` to ``target``, both at their positions, inside the kernel."""
    while size:
        try:
            copied = os.copy_file_range(source, target, size)
        except OSError:  # not between these file systems
            copied = 0
        copied = copied or os.sendfile(target, source, None, min(size, 2**30))
        if not copied:
            raise OSError("the file became shorter while it was copied")
        size -= copied


def write_dataset(
    prefixes: Sequence[Path], output: Path, tokenizers: tuple[Path, Path], codebook: CodebookUse
) -> Manifest:
    """Join the stores ``prefixes``, which must be alike, as the dataset ``output``; its manifest comes last.

    tokenizers: files of the text and the image tokenizer.
    """
    total, sources = None, []

    def count(store: IndexedDataset) -> None:
        nonlocal total
        total = store.manifest if total is None else _sum(total, store.manifest)
        _add_sources(sources, store.manifest.sources)

    digests = merge(prefixes, output, count, overwrite=True)
    write_ledger(output, ledger_lines(prefixes))
    write_file(store_path(output, ".codebook.json"), codebook.content())
    text, image = (relative_path(path, output) for path in tokenizers)
    manifest = replace(
        total,
        text=replace(total.text, tokenizer=text, captions=caption_lengths(IndexedDataset(output))),
        image=replace(total.image, tokenizer=image),
        sources=tuple(sources),
        index_sha256=digests.index_sha256,
        bin_blocks=digests.bin_blocks,
    )
    manifest.write(output)
    return manifest


def _sum(a: Manifest, b: Manifest) -> Manifest:
    """Counts and ranges of two stores together."""

    def extreme(choose, content: str, name: str) -> int | None:
        values = (getattr(getattr(manifest, content), name) for manifest in (a, b))
        return choose((value for value in values if value is not None), default=None)

    text = {"min_id": extreme(min, "text", "min_id"), "max_id": extreme(max, "text", "max_id")}
    if None not in (a.text.unknown, b.text.unknown):
        text["unknown"] = a.text.unknown + b.text.unknown
    image = {"min_code": extreme(min, "image", "min_code"), "max_code": extreme(max, "image", "max_code")}
    return replace(
        a,
        documents=a.documents + b.documents,
        sequences=a.sequences + b.sequences,
        tokens=TokenCounts(a.tokens.text + b.tokens.text, a.tokens.image + b.tokens.image),
        text=replace(a.text, **text),
        image=replace(a.image, **image),
    )


def _add_sources(sources: list[Source], more: Iterable[Source]) -> None:
    """Append ``more``; what continues the last source is counted there."""
    for source in more:
        if sources and source.name == sources[-1].name and source.sha256 is None and source.size is None:
            sources[-1] = replace(sources[-1], samples=sources[-1].samples + source.samples)
        else:
            sources.append(source)


def write_ledger(output: Path, lines: Iterable[bytes]) -> None:
    """Write PREFIX.ledger.jsonl."""
    file = PendingFile(store_path(output, ".ledger.jsonl"))
    try:
        for line in lines:
            file.write(line)
        commit([file])
    finally:
        file.discard()


def check_output(prefix: Path, overwrite: bool) -> None:
    """Raise DataFileError where ``prefix`` is taken, unless it may be overwritten."""
    if overwrite:
        return
    manifest = store_path(prefix, ".json")
    if manifest.exists():
        folder = store_path(prefix, ".parts")
        remedy = "Pass --overwrite to replace it, or another prefix"
        if folder.exists():
            remedy += f"; {folder.name}, left by an interrupted run, is only needed to go on with --overwrite"
        raise DataFileError(manifest, "there is a complete dataset", remedy)
    index = store_path(prefix, ".idx")
    if index.exists() and not store_path(prefix, ".parts").exists():
        problem = "there is a dataset that this tool did not write"
        raise DataFileError(index, problem, "Pass --overwrite to replace it, or another prefix")


@contextmanager
def only_writer(prefix: Path, overwrite: bool) -> Iterator[Path]:
    """Hold the lock of the dataset ``prefix``, rid of a killed run's temporary files; PREFIX.parts, for its parts.

    Raises DataFileError where the prefix is taken or another run writes it.
    """
    check_output(prefix, overwrite)
    folder = store_path(prefix, ".parts")
    try:
        with only_run(folder):
            try:
                check_output(prefix, overwrite)  # again: another run may have finished it meanwhile
                for suffix in (".bin", ".idx", ".json", ".ledger.jsonl", ".codebook.json"):
                    for path in prefix.parent.glob(f"{prefix.name}{suffix}.*.tmp"):
                        path.unlink()
                yield folder
            finally:
                (folder / "lock").unlink(missing_ok=True)  # while it is held: after that it may be another run's
    finally:
        with suppress(OSError):  # NFS keeps files that are open; the folder of an unfinished run is not empty
            folder.rmdir()


def merge_datasets(prefixes: Sequence[Path], output: Path, overwrite: bool) -> Manifest:
    """Join finished datasets, in the order given, as the dataset ``output``. Raises DataFileError."""
    if os.path.realpath(output) in map(os.path.realpath, prefixes):
        raise DataFileError(output, "is also one of the datasets to merge", "Choose another output prefix")
    with only_writer(output, overwrite):
        first, documents = None, 0
        for prefix in prefixes:
            manifest = read_manifest(prefix)
            first = first or manifest
            _require_alike(store_path(prefix, ".json"), manifest, store_path(prefixes[0], ".json"), first)
            documents += manifest.documents
        if not documents:
            raise DataFileError(output, "the datasets to merge have no documents", "Nothing was written")
        tokenizers = tuple(prefixes[0].parent / content.tokenizer for content in (first.text, first.image))
        counts = np.zeros(first.image.codebook_size, np.int64)
        for prefix in prefixes:
            use = CodebookUse.read(prefix, len(counts)) or CodebookUse.of_store(IndexedDataset(prefix), len(counts))
            counts += use.counts
        return write_dataset(prefixes, output, tokenizers, CodebookUse(counts))


def read_manifest(prefix: Path) -> Manifest:
    """The manifest of a dataset of captioned images. DataFileError where it has none or has other content."""
    path = store_path(prefix, ".json")
    manifest = Manifest.read(prefix)
    if manifest is None:
        raise DataFileError(path, "not found: no finished dataset has this prefix", "Pass the prefix of finished ones")
    if manifest.text is None or manifest.image is None:
        raise DataFileError(path, "not a dataset of captions and images", "Merge those of tools/preprocess_data.py")
    return manifest


def _require_alike(path: Path, manifest: Manifest, first_path: Path, first: Manifest) -> None:
    fields, expected = _flat(manifest), _flat(first)
    for name in expected:
        if name not in FREE and fields[name] != expected[name]:
            problem = f"{name} is {fields[name]}, in {first_path} it is {expected[name]}"
            remedy = "Merge datasets made with the same tokenizers, crop and precision"
            raise DataFileError(path, problem, remedy)


def _flat(manifest: Manifest) -> dict:
    """Fields by name: dtype, text.sha256, image.crop ..."""
    fields = asdict(manifest)
    for content in ("text", "image"):
        fields |= {f"{content}.{name}": value for name, value in fields.pop(content).items()}
    return fields


def ledger_lines(prefixes: Iterable[Path]) -> Iterator[bytes]:
    """Lines of the ledgers that the stores have."""
    for prefix in prefixes:
        path = store_path(prefix, ".ledger.jsonl")
        if path.exists():
            with open(path, "rb") as file:
                yield from file
