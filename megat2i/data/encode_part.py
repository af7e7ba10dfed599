"""One part of a preprocessing job: its samples tokenized into a small store of their own, atomically, once.

The store's manifest is written last. Beside it lies a record: the fingerprint of all that decides the bytes (the
samples' files, the tokenizers, the crop, the decoder's version) and what was refused. A part whose manifest verifies
and whose fingerprint is the present one is kept by a later run; anything else is written again.
"""

import copy
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL
import torch

from megat2i.data.images import CROPS as SQUARES
from megat2i.data.images import UnreadableImage, fit_square, to_tensor
from megat2i.data.indexed import IndexedDataset, IndexedWriter
from megat2i.data.manifest import ImageContent, Manifest, Source, TextContent, TokenCounts
from megat2i.data.samples import Part, Refused, Sample
from megat2i.files import DataFileError, PendingFile, commit, store_path
from megat2i.tokenizers.image import ImageTokenizer, load_image_tokenizer
from megat2i.tokenizers.movqgan import MoVQGAN, prepare
from megat2i.tokenizers.text import TextTokenizer, load_text_tokenizer
from megat2i.vocab import IMAGE, TEXT

BATCH = 64  # samples tokenized together
UINT16_IDS = 1 << 16
CROPS = (*SQUARES, MoVQGAN.crop)
# Decoders reduce a JPEG on reading where that leaves twice this many pixels a side: never, below 64 megapixels.
WHOLE = 2048
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
    """A finished part: its manifest, how many samples it refused, how often it has each code (int64 [codes])."""

    manifest: Manifest
    refused: int
    code_counts: np.ndarray


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


def encode_part(part: Part, prefix: Path, encoding: Encoding, report: Callable[[int], None]) -> EncodedPart:
    """Write the store ``prefix`` of ``part`` unless a valid one is there.

    ``report`` is called with the number of samples done since its last call.
    """
    fingerprint = _fingerprint(part, encoding)
    manifest, refused = _kept_part(prefix, fingerprint) or (None, 0)
    if manifest is None:
        manifest, refused = _write_part(part, prefix, encoding, fingerprint, report)
    else:
        report(manifest.documents + refused)
    return EncodedPart(manifest, refused, _code_counts(prefix, manifest.image.codebook_size))


def _write_part(
    part: Part, prefix: Path, encoding: Encoding, fingerprint: str, report: Callable[[int], None]
) -> tuple[Manifest, int]:
    """Write the store ``prefix``; returns (its manifest, samples refused)."""
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


def _code_counts(prefix: Path, codebook_size: int) -> np.ndarray:
    """How often each code stands in the store ``prefix``: int64 [codebook_size]."""
    store = IndexedDataset(prefix)
    if store.modes is None:  # an empty store
        return np.zeros(codebook_size, np.int64)
    return np.bincount(store.tokens[np.repeat(store.modes == IMAGE, store.lengths)], minlength=codebook_size)


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
        batches = _readable(part, image.image_size, encoding.crop, [], lambda _: None, min(BATCH, share))
        for _, pixels in itertools.islice(batches, -(-share // BATCH)):
            same = image.encode(pixels) == exact.encode(pixels)
            images, codes, equal = images + len(pixels), codes + same.numel(), equal + int(same.sum())
    return (images, equal / codes) if codes else None


def read_refused(prefix: Path) -> list[Refused]:
    """What the finished part ``prefix`` refused."""
    return [Refused(*pair) for pair in _read_record(prefix)["refused"]]


def _readable(
    part: Part, size: int, crop: str, refused: list[Refused], report: Callable[[int], None], batch: int = BATCH
) -> Iterator[tuple[list[Sample], torch.Tensor]]:
    """Batches of readable samples with their images uint8 [B, 3, size, size]; the others go to ``refused``."""
    samples, images = [], []
    for sample in part.samples():
        report(1)
        if isinstance(sample, Refused):
            refused.append(sample)
            continue
        try:
            images.append(_square(sample, size, crop))
        except UnreadableImage as error:
            refused.append(Refused(sample.name, str(error)))
            continue
        samples.append(sample)
        if len(samples) == batch:
            yield samples, torch.stack(images)
            samples, images = [], []
    if samples:
        yield samples, torch.stack(images)


def _square(sample: Sample, size: int, crop: str) -> torch.Tensor:
    """The image of ``sample`` as uint8 [3, size, size]. Raises UnreadableImage."""
    if crop == MoVQGAN.crop:  # from all pixels of the file, as the original does
        return prepare(sample.image(max(size, WHOLE)), size)
    return to_tensor(fit_square(sample.image(size), size, crop))


def _fingerprint(part: Part, encoding: Encoding) -> str:
    text, image = open_tokenizers(encoding)
    # The last two: another release or device may round differently, and a code on the border of two then changes.
    versions = [f"Pillow {PIL.__version__}", f"torch {torch.__version__}", f"CUDA {torch.cuda.is_available()}"]
    content = [repr(part), part.identity(), text.sha256, image.sha256, encoding.crop, *versions]
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
