"""One part of a preprocessing job: its samples tokenized into a small store of their own, atomically, once.

The store's manifest is written last. Beside it lies a record: the fingerprint of all that decides the bytes (the
samples' files, the tokenizers, the crop, the decoder's version) and what was refused. A part whose manifest verifies
and whose fingerprint is the present one is kept by a later run; anything else is written again.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL
import torch

from megat2i.data.images import UnreadableImage, fit_square, to_tensor
from megat2i.data.indexed import IndexedWriter
from megat2i.data.manifest import ImageContent, Manifest, Source, TextContent, TokenCounts
from megat2i.data.samples import Part, Refused, Sample
from megat2i.files import DataFileError, PendingFile, commit, store_path
from megat2i.tokenizers.image import ImageTokenizer, load_image_tokenizer
from megat2i.tokenizers.text import TextTokenizer, load_text_tokenizer
from megat2i.vocab import IMAGE, TEXT

BATCH = 64  # samples tokenized together
UINT16_IDS = 1 << 16


@dataclass(frozen=True)
class Encoding:
    """What samples become, whatever their source: files of the two tokenizers and the crop (see ``fit_square``)."""

    text_tokenizer: Path
    image_tokenizer: Path
    crop: str


@functools.lru_cache(maxsize=1)
def open_tokenizers(encoding: Encoding) -> tuple[TextTokenizer, ImageTokenizer]:
    """Both tokenizers, opened once per process."""
    return load_text_tokenizer(encoding.text_tokenizer), load_image_tokenizer(encoding.image_tokenizer)


@dataclass
class _Written:
    """Numbers about the tokens of a store."""

    documents: int = 0
    tokens: list[int] = field(default_factory=lambda: [0, 0])  # by modality
    least: list[int | None] = field(default_factory=lambda: [None, None])
    largest: list[int | None] = field(default_factory=lambda: [None, None])

    def add(self, modality: int, ids: np.ndarray) -> None:
        if len(ids):
            low, high = int(ids.min()), int(ids.max())
            old_low, old_high = self.least[modality], self.largest[modality]
            self.least[modality] = low if old_low is None else min(low, old_low)
            self.largest[modality] = high if old_high is None else max(high, old_high)
            self.tokens[modality] += len(ids)


def encode_part(part: Part, prefix: Path, encoding: Encoding, report: Callable[[int], None]) -> tuple[Manifest, int]:
    """Write the store ``prefix`` of ``part`` unless a valid one is there. Returns (its manifest, samples refused).

    ``report`` is called with the number of samples done since its last call.
    """
    fingerprint = _fingerprint(part, encoding)
    kept = _kept_part(prefix, fingerprint)
    if kept is not None:
        report(kept[0].documents + kept[1])
        return kept
    store_path(prefix, ".json").unlink(missing_ok=True)
    text, image = open_tokenizers(encoding)
    refused: list[Refused] = []
    written = _Written()
    dtype = np.uint16 if max(text.vocab_size, image.codebook_size) <= UINT16_IDS else np.int32
    with IndexedWriter(prefix, dtype) as writer:
        for samples, images in _readable(part, image.image_size, encoding.crop, refused, report):
            codes = image.encode(images).numpy()
            captions = text.encode([sample.caption for sample in samples])
            for sample, ids, image_codes in zip(samples, captions, codes, strict=True):
                if not ids:
                    refused.append(Refused(sample.name, "the tokenizer gives no token for the caption"))
                    continue
                ids = np.asarray(ids, dtype=np.int64)
                writer.add_document([ids, image_codes], [TEXT, IMAGE])
                written.documents += 1
                written.add(TEXT, ids)
                written.add(IMAGE, image_codes)
    _write_record(prefix, fingerprint, refused)
    manifest = _manifest(part, encoding, prefix, written, np.dtype(dtype).name, writer.digests)
    manifest.write(prefix)
    return manifest, len(refused)


def read_refused(prefix: Path) -> list[Refused]:
    """What the finished part ``prefix`` refused."""
    return [Refused(*pair) for pair in _read_record(prefix)["refused"]]


def _readable(
    part: Part, size: int, crop: str, refused: list[Refused], report: Callable[[int], None]
) -> Iterator[tuple[list[Sample], torch.Tensor]]:
    """Batches of readable samples with their images uint8 [B, 3, size, size]; the others go to ``refused``."""
    samples, images = [], []
    for sample in part.samples():
        report(1)
        if isinstance(sample, Refused):
            refused.append(sample)
            continue
        try:
            images.append(to_tensor(fit_square(sample.image(size), size, crop)))
        except UnreadableImage as error:
            refused.append(Refused(sample.name, str(error)))
            continue
        samples.append(sample)
        if len(samples) == BATCH:
            yield samples, torch.stack(images)
            samples, images = [], []
    if samples:
        yield samples, torch.stack(images)


def _fingerprint(part: Part, encoding: Encoding) -> str:
    text, image = open_tokenizers(encoding)
    content = [repr(part), part.identity(), text.sha256, image.sha256, encoding.crop, f"Pillow {PIL.__version__}"]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _kept_part(prefix: Path, fingerprint: str) -> tuple[Manifest, int] | None:
    """(manifest, samples refused) of a part that an earlier run finished with this fingerprint; None: write it."""
    try:
        manifest = Manifest.read(prefix)
        if manifest is None or _read_record(prefix)["fingerprint"] != fingerprint:
            return None
        manifest.verify(prefix)
    except DataFileError:  # damaged: no harm, it is written again
        return None
    return manifest, len(read_refused(prefix))


def _record_path(prefix: Path) -> Path:
    return store_path(prefix, ".record.json")


def _write_record(prefix: Path, fingerprint: str, refused: list[Refused]) -> None:
    record = {"fingerprint": fingerprint, "refused": [[one.name, one.reason] for one in refused]}
    file = PendingFile(_record_path(prefix))
    try:
        file.write(json.dumps(record).encode())
        commit([file])
    finally:
        file.discard()


def _read_record(prefix: Path) -> dict:
    path = _record_path(prefix)
    try:
        record = json.loads(path.read_bytes())
        if {"fingerprint", "refused"} <= set(record):
            return record
    except (OSError, ValueError) as error:
        raise DataFileError(path, f"not a readable record ({error})", "Remove it") from error
    raise DataFileError(path, "not a record of a part", "Remove it")


def _manifest(part: Part, encoding: Encoding, prefix: Path, written: _Written, dtype: str, digests) -> Manifest:
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
            tokenizer=text.path.name,
            kind=text.kind,
            sha256=text.sha256,
        ),
        image=ImageContent(
            codebook_size=image.codebook_size,
            min_code=written.least[IMAGE],
            max_code=written.largest[IMAGE],
            grid=image.grid,
            image_size=image.image_size,
            crop=encoding.crop,
            encoder_precision=image.encoder_precision,
            tokenizer=encoding.image_tokenizer.name,
            kind=image.kind,
            sha256=image.sha256,
        ),
        sources=(Source(part.source, written.documents, size=0),),
        index_sha256=digests.index_sha256,
        bin_blocks=digests.bin_blocks,
    )
