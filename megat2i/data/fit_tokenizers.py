"""Tokenizers made from the corpus: byte-level BPE of its captions, a k-means codebook of a sample of its images.

The file of a tokenizer lies beside the datasets that use it. It is not replaced by a different one unless asked for:
those datasets would lose their meaning.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import torch

from megat2i.data.images import UnreadableImage, fit_square, to_tensor
from megat2i.data.samples import Part, Refused, Sample
from megat2i.files import DataFileError, PendingFile, commit
from megat2i.progress import Progress, progress
from megat2i.tokenizers.patch import PatchTokenizer
from megat2i.tokenizers.text import train_text_tokenizer

IMAGES = 4096  # of the corpus, at most, that a codebook is fitted on
IMAGE_BYTES = 2**28  # of their pixels, at most
PARTS = 64  # that they are taken from


def fit_text_tokenizer(parts: Sequence[Part], vocab_size: int, path: Path, overwrite: bool) -> None:
    """Train a byte-level BPE on every caption of ``parts``; write it to ``path``. Raises DataFileError."""
    captions = (sample.caption for part in parts for sample in part.samples() if isinstance(sample, Sample))
    first = next(captions, None)
    if first is None:
        raise DataFileError(path, "the inputs have no caption to train on", _first_problem(parts))

    with Progress(None, "training the text tokenizer", "captions") as shown:

        def texts() -> Iterator[str]:
            for caption in chain([first], captions):
                yield caption
                shown.update()

        _publish(path, overwrite, lambda temporary: train_text_tokenizer(texts(), vocab_size, temporary))


def fit_image_tokenizer(
    parts: Sequence[Part], image_size: int, patch_size: int, codebook_size: int, crop: str, path: Path, overwrite: bool
) -> None:
    """Fit a PatchTokenizer to a sample of the images of ``parts``; write it to ``path``. Raises DataFileError.

    The sample is the same every time: the first readable images of evenly spaced parts.
    """
    wanted = max(1, min(IMAGES, IMAGE_BYTES // (3 * image_size * image_size)))
    chosen = [parts[i * len(parts) // min(PARTS, len(parts))] for i in range(min(PARTS, len(parts)))]
    share = -(-wanted // max(1, len(chosen)))
    found = (image for part in chosen for image in islice(_images(part, image_size, crop), share))
    expected = [part.expected for part in chosen]
    total = wanted if None in expected else sum(min(share, number) for number in expected)
    images = list(progress(found, "reading images to fit the image tokenizer", "images", total))
    if not images:
        raise DataFileError(path, "the inputs have no readable image to fit a codebook to", _first_problem(chosen))
    try:
        tokenizer = PatchTokenizer.fit(torch.stack(images), patch_size, codebook_size, crop=crop)
    except ValueError as error:
        raise DataFileError(path, f"cannot be fitted: {error}", "No tokenizer was written or changed") from error
    _publish(path, overwrite, tokenizer.save)


def _images(part: Part, size: int, crop: str) -> Iterator[torch.Tensor]:
    for sample in part.samples():
        if isinstance(sample, Sample):
            try:
                yield to_tensor(fit_square(sample.image(size), size, crop))
            except UnreadableImage:
                continue  # the job itself lists it in the ledger


def _first_problem(parts: Sequence[Part]) -> str:
    """A remedy that names the first sample of ``parts`` that cannot be used."""
    for part in parts:
        for sample in part.samples():
            if isinstance(sample, Refused):
                return f"The first: {part.source}: {sample.name}: {sample.reason}"
            try:
                sample.image(1)
            except UnreadableImage as error:
                return f"The first: {part.source}: {sample.name}: {error}"
    return "The inputs are empty"


def _publish(path: Path, overwrite: bool, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file and give it the name ``path``, unless another content is there already."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, path.name))
        content = Path(folder, path.name).read_bytes()
    if path.exists() and not overwrite and path.read_bytes() != content:
        remedy = "Use it with --text-tokenizer or --image-tokenizer, pass --overwrite, or choose another folder"
        raise DataFileError(path, "there is another tokenizer, and datasets may depend on it", remedy)
    file = PendingFile(path)
    try:
        file.write(content)
        commit([file])
    finally:
        file.discard()
