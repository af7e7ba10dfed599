"""Check datasets from the first byte to the last: structure, digests, ranges of ids, tokenizers, use of codes.

    python tools/verify_data.py data/photos/train
    python tools/verify_data.py data/web/train.shards --samples 16 --grid samples.png

Prints one line for every fault and ends with status 1 where there is one. A PREFIX.shards folder stands for all of its
shards. Of a store without a manifest (other programs write none) only the structure can be checked. With --grid some
samples are decoded and drawn with their captions: what digests cannot tell, the eye sees.
"""

import argparse
import functools
import os
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import megat2i  # noqa: F401 (before torch: it sets how threads wait)

# isort: split
import numpy as np

from megat2i.data.array_job import finished_shards
from megat2i.data.codebook_use import CodebookUse, token_blocks
from megat2i.data.indexed import IndexedDataset
from megat2i.data.manifest import Manifest, TokenCounts, digest_file
from megat2i.data.stored_pictures import stored_pictures
from megat2i.files import DataFileError, store_path
from megat2i.pictures import save_png, sheet
from megat2i.printable import ArgumentParser, printable
from megat2i.progress import Progress
from megat2i.vocab import IMAGE, TEXT
from megat2i.weights_file import file_sha256

GIVEN = {"text": "--text-tokenizer", "image": "--image-tokenizer"}
DOCUMENTS = 1 << 17  # looked at together: bounds the memory
digest_once = functools.cache(file_sha256)  # the shards of a job have their tokenizers in common


def parse_arguments() -> argparse.Namespace:
    description, _, more = __doc__.partition("\n\n")
    parser = ArgumentParser(description=description, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", type=Path, metavar="PREFIX")
    for option in GIVEN.values():
        parser.add_argument(option, type=Path, metavar="FILE", help="default: where the manifest says")
    parser.add_argument("--samples", type=int, default=16, metavar="N", help="pictures of the grid (default 16)")
    parser.add_argument("--grid", type=Path, metavar="PNG", help="decode samples of the datasets into this picture")
    args = parser.parse_args()
    if args.samples < 1:
        parser.error(f"--samples is {args.samples}, expected at least 1")
    return args


def faults(prefix: Path, tokenizers: dict[str, Path | None]) -> Iterator[str]:
    """One line for everything that is wrong with the dataset ``prefix``. Prints what it holds."""
    try:
        manifest = Manifest.read(prefix)
        damaged = list(_byte_faults(prefix, manifest)) if manifest else []
        yield from damaged
        if manifest:
            yield from _tokenizer_faults(prefix, manifest, tokenizers)
        if damaged:  # what else would be found are its consequences
            return
        store = IndexedDataset(prefix)
        size = f"{store.number_of_documents:,} documents, {len(store):,} sequences, {store.token_count:,} tokens"
        print(f"{prefix}: {size}{'' if manifest else '; no manifest: only the structure was checked'}")
        if manifest:
            yield from _document_faults(store, manifest)
            yield from _token_faults(store, manifest)
    except DataFileError as error:
        yield str(error)
    except OSError as error:
        yield f"{prefix}: {error}"


def _byte_faults(prefix: Path, manifest: Manifest) -> Iterator[str]:
    try:
        manifest.verify(prefix, data=False)
    except DataFileError as error:
        yield str(error)
    path, block = store_path(prefix, ".bin"), manifest.bin_blocks.block_bytes
    if not path.exists():
        return
    with Progress(path.stat().st_size, f"digests of {path.name}", "bytes") as bar:
        found = digest_file(path, block, bar.update).sha256
    for number, (expected, actual) in enumerate(zip_longest(manifest.bin_blocks.sha256, found)):
        if expected != actual:
            yield f"{path}: bytes {number * block:,} to {(number + 1) * block - 1:,} differ from the manifest's digest"


def _tokenizer_faults(prefix: Path, manifest: Manifest, given: dict[str, Path | None]) -> Iterator[str]:
    for name in GIVEN:
        content = getattr(manifest, name)
        if content is None:
            continue
        path = given[name] or prefix.parent / content.tokenizer
        try:
            if digest_once(os.path.realpath(path)) != content.sha256:
                yield f"{path}: its SHA-256 is not the {name}.sha256 of {store_path(prefix, '.json').name}"
        except DataFileError as error:
            yield f"{error}, or pass {GIVEN[name]}"


def _document_faults(store: IndexedDataset, manifest: Manifest) -> Iterator[str]:
    """Compare the sources, and of captioned images the sequences of every document, with the manifest."""
    path, documents = store_path(store.prefix, ".json"), store.number_of_documents
    if (samples := sum(source.samples for source in manifest.sources)) != documents:
        yield f"{path}: sources have {samples:,} samples, there are {documents:,} documents"
    if not documents or None in (manifest.text, manifest.image):
        return
    rows, columns = manifest.image.grid
    if store.modes is None or len(store) != 2 * documents:
        yield f"{store.index_path}: its documents are not a text sequence and an image each"
        return
    for start in range(0, documents, DOCUMENTS):
        some = slice(2 * start, 2 * (start + DOCUMENTS))
        modes, lengths = store.modes[some].reshape(-1, 2), store.lengths[some].reshape(-1, 2)
        firsts = np.arange(2 * start, 2 * start + modes.size, 2)
        wrong = (modes != (TEXT, IMAGE)).any(1) | (store.documents[start : start + len(firsts)] != firsts)
        wrong |= lengths[:, 1] != rows * columns
        store.release()
        if wrong.any():
            document = f"document {start + int(wrong.argmax()):,}"
            yield f"{store.index_path}: {document} is not a text sequence and an image of {rows} x {columns} codes"
            return


def _token_faults(store: IndexedDataset, manifest: Manifest) -> Iterator[str]:
    """Compare every id with what the manifest says of ids: ranges, numbers, vocabularies; and the use of codes."""
    least, largest, numbers = [None, None], [None, None], [0, 0]
    counts = np.zeros(manifest.image.codebook_size if manifest.image else 0, np.int64)
    name = store.bin_path.name
    with Progress(store.token_count, f"ids of {name}", "tokens") as bar:
        for tokens, is_image in token_blocks(store):
            for modality, ids in ((TEXT, tokens[~is_image]), (IMAGE, tokens[is_image])):
                if len(ids):
                    low, high = int(ids.min()), int(ids.max())
                    least[modality] = low if least[modality] is None else min(low, least[modality])
                    largest[modality] = high if largest[modality] is None else max(high, largest[modality])
                    numbers[modality] += len(ids)
            codes = tokens[is_image]
            counts += np.bincount(codes[(codes >= 0) & (codes < len(counts))], minlength=len(counts))
            bar.update(len(tokens))
    path = store_path(store.prefix, ".json")
    if TokenCounts(*numbers) != manifest.tokens:
        yield f"{path}: tokens says {manifest.tokens}, there are {TokenCounts(*numbers)}"
    for modality, field, kind, size in ((TEXT, "text", "id", "vocab_size"), (IMAGE, "image", "code", "codebook_size")):
        if (content := getattr(manifest, field)) is None:
            continue
        said = (getattr(content, f"min_{kind}"), getattr(content, f"max_{kind}"))
        if said != (least[modality], largest[modality]):
            found = f"{least[modality]} to {largest[modality]}"
            yield f"{path}: {field} {kind}s are {said[0]} to {said[1]}, {name} has {found}"
        if largest[modality] is not None and not 0 <= least[modality] <= largest[modality] < getattr(content, size):
            found = f"{least[modality]} to {largest[modality]}"
            yield f"{store.bin_path}: {field} {kind}s are {found}, {size} is {getattr(content, size)}"
    if manifest.image is not None:
        yield from _codebook_faults(store, CodebookUse(counts))


def _codebook_faults(store: IndexedDataset, found: CodebookUse) -> Iterator[str]:
    said = CodebookUse.read(store.prefix, len(found.counts))
    if said is not None and not np.array_equal(said.counts, found.counts):
        yield f"{store_path(store.prefix, '.codebook.json')}: its counts are not those of the tokens"
    if found.used:
        print(f"codebook: {found}")


def draw(prefixes: list[Path], given: dict[str, Path | None], samples: int, path: Path) -> None:
    """Decode documents spread evenly over the datasets and write them with their captions to ``path``."""
    cells = []
    for number, prefix in enumerate(prefixes):
        share = (number + 1) * samples // len(prefixes) - number * samples // len(prefixes)
        manifest = Manifest.read(prefix)
        if not share or manifest is None or not manifest.documents or None in (manifest.text, manifest.image):
            continue
        share = min(share, manifest.documents)
        documents = (i * manifest.documents // share for i in range(share))
        cells += [(text, [picture]) for text, picture in stored_pictures(prefix, documents, *map(given.get, GIVEN))]
    if not cells:
        raise DataFileError(path, "there is no captioned image to draw", "Pass a dataset with a manifest")
    save_png(sheet(cells, columns=min(8, len(cells))), path)
    print(f"{path}: {len(cells)} samples")


def main() -> None:
    args = parse_arguments()
    given = {"text": args.text_tokenizer, "image": args.image_tokenizer}
    found, prefixes = 0, []
    for path in args.inputs:
        try:
            stores, error = finished_shards(path) if path.is_dir() else ([path], None)
        except (DataFileError, OSError) as unusable:
            stores, error = [], unusable
        prefixes += stores
        if error:
            found += 1
            print(f"FAULT {error}")
    for prefix in prefixes:
        for line in faults(prefix, given):
            found += 1
            print(f"FAULT {printable(line)}", flush=True)
    if args.grid and not found:
        try:
            draw(prefixes, given, args.samples, args.grid)
        except (DataFileError, OSError) as error:
            found += 1
            print(f"FAULT {error}")
    if found:
        sys.exit(1)
    print(f"no fault in {len(prefixes):,} dataset{'s' * (len(prefixes) > 1)}")


if __name__ == "__main__":
    main()
