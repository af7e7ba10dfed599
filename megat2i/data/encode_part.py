"""One part of a preprocessing job: its samples tokenized into a small store of their own, atomically, once.

The store's manifest is written last, after its ledger, the use of its codes and a record: the fingerprint of all that
decides the bytes (the samples' files, the tokenizers, the crop, the decoder's version). A part whose manifest verifies
and whose fingerprint is the present one is kept by a later run; anything else is written again.
"""

import copy
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL
import torch

from megat2i.data.codebook_use import CodebookUse
from megat2i.data.deadly import DecodingGuard
from megat2i.data.decoding import BATCH, decode, readable
from megat2i.data.indexed import IndexedDataset, IndexedWriter
from megat2i.data.manifest import ImageContent, Manifest, Source, TextContent, TokenCounts, relative_path
from megat2i.data.merge import write_ledger
from megat2i.data.samples import Part, Refused, Sample
from megat2i.data.sources import describe_source, source_identity
from megat2i.files import DataFileError, store_path, write_file
from megat2i.tokenizers.image import ImageTokenizer, load_image_tokenizer
from megat2i.tokenizers.text import TextTokenizer, UnencodableText, load_text_tokenizer
from megat2i.vocab import IMAGE, TEXT

UINT16_IDS = 1 << 16
AGREEMENT_IMAGES = {"cpu": 64, "cuda": 1024}  # compared with float32 before a job in lower precision
AGREEMENT_PARTS = 64  # that they are taken from


@dataclass(frozen=True)
class Encoding:
    """What samples become, whatever their source: files of the two tokenizers and the crop.

    crop: see ``fit_square``; movq: see ``movqgan.prepare``.
    """

    text_tokenizer: Path
    image_tokenizer: Path
    crop: str


_device = 0  # number of this process's CUDA device


def use_device(worker: int) -> None:
    """Let this process, the ``worker``-th of a job, encode on its share of the CUDA devices; to be called first."""
    global _device
    _device = worker % max(1, torch.cuda.device_count())


@functools.lru_cache(maxsize=1)
def open_tokenizers(encoding: Encoding) -> tuple[TextTokenizer, ImageTokenizer]:
    """Both tokenizers, opened once per process; the image tokenizer on a CUDA device where there is one.

    Raises DataFileError, also where the image tokenizer's arithmetic is not to be had here.
    """
    image = load_image_tokenizer(encoding.image_tokenizer)
    if image.encoder_precision == "tf32" and not torch.cuda.is_available():
        problem, remedy = "its encoder precision is tf32, which only CUDA devices compute", "Use a machine that has one"
        raise DataFileError(encoding.image_tokenizer, problem, remedy)
    image = image.to(torch.device("cuda", _device) if torch.cuda.is_available() else "cpu")
    return load_text_tokenizer(encoding.text_tokenizer), image


@dataclass(frozen=True)
class EncodedPart:
    """A finished part. ``samples`` includes the ``refused``; ``kept``: an earlier run wrote it."""

    samples: int
    refused: int
    kept: bool
    codebook: CodebookUse


@dataclass
class _Written:
    """Numbers about the tokens of a store."""

    documents: int = 0
    tokens: list[int] = field(default_factory=lambda: [0, 0])  # by modality
    least: list[int | None] = field(default_factory=lambda: [None, None])
    largest: list[int | None] = field(default_factory=lambda: [None, None])
    unknown: int = 0  # text ids that stand for what the tokenizer does not know

    def add(self, modality: int, ids: np.ndarray) -> None:
        if len(ids):
            low, high = int(ids.min()), int(ids.max())
            old_low, old_high = self.least[modality], self.largest[modality]
            self.least[modality] = low if old_low is None else min(low, old_low)
            self.largest[modality] = high if old_high is None else max(high, old_high)
            self.tokens[modality] += len(ids)


def encode_part(
    part: Part, prefix: Path, encoding: Encoding, report: Callable[[int], None], threads: int = 1
) -> EncodedPart:
    """Write the store ``prefix`` of ``part`` unless a valid one is there; ``threads`` decode its images.

    ``report`` is called with the number of samples done since its last call; never for a part that was there.
    """
    fingerprint = _fingerprint(part, encoding)
    kept = _kept_part(prefix, fingerprint)
    manifest, refused = kept or _write_part(part, prefix, encoding, fingerprint, report, threads)
    codebook = CodebookUse.read(prefix, manifest.image.codebook_size)
    return EncodedPart(manifest.documents + refused, refused, kept is not None, codebook)


def _write_part(
    part: Part, prefix: Path, encoding: Encoding, fingerprint: str, report: Callable[[int], None], threads: int
) -> tuple[Manifest, int]:
    """Write the store ``prefix``; returns (its manifest, samples refused)."""
    store_path(prefix, ".json").unlink(missing_ok=True)
    text, image = open_tokenizers(encoding)
    refused: list[Refused] = []
    written = _Written()
    dtype = np.uint16 if max(text.vocab_size, image.codebook_size) <= UINT16_IDS else np.int32
    # The digest of the source is taken beside the decoding and somewhat ahead of it, which then finds the file in
    # memory: it comes from the disk once.
    size, crop = image.image_size, encoding.crop
    guard = DecodingGuard(part, prefix, fingerprint, threads, functools.partial(decode, size=size, crop=crop))
    with guard, ThreadPoolExecutor(1) as hashing, IndexedWriter(prefix, dtype) as writer:
        described = hashing.submit(describe_source, part.source) if part.opens_source else None
        for samples, images in readable(part, size, crop, refused, report, BATCH, threads, guard):
            codes = image.encode(images).numpy()
            for sample, image_codes in zip(samples, codes, strict=True):
                ids = _text_ids(text, sample)
                if isinstance(ids, Refused):
                    refused.append(ids)
                    continue
                ids = np.asarray(ids, dtype=np.int64)
                writer.add_document([ids, image_codes], [TEXT, IMAGE])
                written.documents += 1
                written.add(TEXT, ids)
                written.unknown += int((ids == text.unknown_id).sum()) if text.unknown_id is not None else 0
                written.add(IMAGE, image_codes)
        name = Path(os.path.abspath(part.source)).name
        source = Source(name, written.documents, *(described.result() if described else ()))
    rows = (one.ledger_row(part.source) for one in refused)
    write_ledger(prefix, (json.dumps(row).encode() + b"\n" for row in rows))
    codebook = CodebookUse.of_store(IndexedDataset(prefix), image.codebook_size)
    write_file(store_path(prefix, ".codebook.json"), codebook.content())
    write_file(_record_path(prefix), json.dumps({"fingerprint": fingerprint, "refused": len(refused)}).encode())
    manifest = _manifest(source, encoding, prefix, written, np.dtype(dtype).name, writer.digests)
    manifest.write(prefix)
    manifest.verify(prefix)
    guard.forget()
    return manifest, len(refused)


def _text_ids(text: TextTokenizer, sample: Sample) -> list[int] | Refused:
    try:
        ids = text.encode([sample.caption])[0]
    except UnencodableText as error:
        return Refused(sample.name, str(error))
    return ids or Refused(sample.name, "the tokenizer gives no token for the caption")


def code_agreement(parts: Sequence[Part], encoding: Encoding) -> tuple[int, float] | None:
    """(images, share of their codes that float32 gives too) of a sample.

    None where the encoder computes in float32, and where nothing is readable. The sample is the first readable images
    of evenly spaced parts.
    """
    image = open_tokenizers(encoding)[1]
    if image.encoder_precision == "float32":
        return None
    exact = copy.copy(image)  # shares the weights, which are float32 always
    exact.encoder_precision = "float32"
    wanted = AGREEMENT_IMAGES["cuda" if torch.cuda.is_available() else "cpu"]
    number = min(AGREEMENT_PARTS, len(parts))
    chosen = [parts[i * len(parts) // number] for i in range(number)]
    share = -(-wanted // max(1, len(chosen)))
    images, codes, equal = 0, 0, 0
    for part in chosen:
        decoded = (decode([(0, sample)], image.image_size, encoding.crop)[0][1] for sample in part.samples())
        found = itertools.islice((pixels for pixels in decoded if pixels is not None), share)
        for batch in iter(lambda found=found: list(itertools.islice(found, BATCH)), []):
            pixels = torch.stack(batch)
            same = image.encode(pixels) == exact.encode(pixels)
            images, codes, equal = images + len(pixels), codes + same.numel(), equal + int(same.sum())
    return (images, equal / codes) if codes else None


def _fingerprint(part: Part, encoding: Encoding) -> str:
    text, image = open_tokenizers(encoding)
    # The last two: another release or device may round differently, and a code on the border of two then changes.
    versions = [f"Pillow {PIL.__version__}", f"torch {torch.__version__}", f"CUDA {torch.cuda.is_available()}"]
    source = source_identity(part.source) if part.opens_source else None  # its digest is part of the manifest
    content = [repr(part), part.identity(), source, text.sha256, image.sha256, encoding.crop, *versions]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _kept_part(prefix: Path, fingerprint: str) -> tuple[Manifest, int] | None:
    """(manifest, samples refused) of a part that an earlier run finished with this fingerprint; None: write it."""
    try:
        manifest = Manifest.read(prefix)
        refused = store_path(prefix, ".ledger.jsonl").read_bytes().count(b"\n")
        expected = {"fingerprint": fingerprint, "refused": refused}
        if manifest is None or json.loads(_record_path(prefix).read_bytes()) != expected:
            return None
        manifest.verify(prefix)
        if CodebookUse.read(prefix, manifest.image.codebook_size) is None:
            return None
    except (OSError, ValueError):  # damaged or incomplete: no harm, it is written again
        return None
    return manifest, refused


def _record_path(prefix: Path) -> Path:
    return store_path(prefix, ".record.json")


def _manifest(source: Source, encoding: Encoding, prefix: Path, written: _Written, dtype: str, digests) -> Manifest:
    text, image = open_tokenizers(encoding)
    return Manifest(
        documents=written.documents,
        sequences=2 * written.documents,
        tokens=TokenCounts(*written.tokens),
        dtype=dtype,
        text=TextContent(
            vocab_size=text.vocab_size,
            min_id=written.least[TEXT],
            max_id=written.largest[TEXT],
            tokenizer=relative_path(text.path, prefix),
            kind=text.kind,
            sha256=text.sha256,
            unknown=None if text.unknown_id is None else written.unknown,
        ),
        image=ImageContent(
            codebook_size=image.codebook_size,
            min_code=written.least[IMAGE],
            max_code=written.largest[IMAGE],
            grid=image.grid,
            image_size=image.image_size,
            crop=encoding.crop,
            encoder_precision=image.encoder_precision,
            tokenizer=relative_path(encoding.image_tokenizer, prefix),
            kind=image.kind,
            sha256=image.sha256,
        ),
        sources=(source,),
        index_sha256=digests.index_sha256,
        bin_blocks=digests.bin_blocks,
    )
