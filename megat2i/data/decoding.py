"""Batches of decoded images, which threads make ahead of whoever encodes them.

Pillow's decoders and its resize let go of the interpreter's lock, so threads decode beside each other and beside the
encoder. One thread reads the part and puts the next batch together while the last one is encoded. Batches and order do
not depend on the number of threads.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice

import torch

from megat2i.data.deadly import DecodingGuard
from megat2i.data.images import CROPS as SQUARES
from megat2i.data.images import UnreadableImage, fit_square, to_tensor
from megat2i.data.samples import Part, Refused, Sample
from megat2i.tokenizers.movqgan import MoVQGAN, prepare

BATCH = 64  # samples tokenized together
CHUNK = 8  # samples that a thread takes at a time
CROPS = (*SQUARES, MoVQGAN.crop)
# Decoders reduce a JPEG on reading where that leaves twice this many pixels a side: never, below 64 megapixels.
WHOLE = 2048


def readable(
    part: Part,
    size: int,
    crop: str,
    refused: list[Refused],
    report: Callable[[int], None],
    batch: int = BATCH,
    threads: int = 1,
    guard: DecodingGuard | None = None,
) -> Iterator[tuple[list[Sample], torch.Tensor]]:
    """Batches of readable samples with their images uint8 [B, 3, size, size]; the others go to ``refused``.

    ``report`` is called with the number of samples, readable or not, since its last call. ``guard`` knows what
    must not be decoded.
    """
    with ThreadPoolExecutor(threads) as decoders, ThreadPoolExecutor(1) as reader:
        ahead = max(batch // CHUNK, 2 * threads)  # chunks under way beyond the next batch
        work = functools.partial(decode, size=size, crop=crop, guard=guard)
        decoded = _in_order(enumerate(part.samples()), work, decoders, ahead)
        batches = _batches(decoded, batch)
        coming = reader.submit(next, batches, None)
        while (found := coming.result()) is not None:
            coming = reader.submit(next, batches, None)
            samples, images, unusable = found
            refused += unusable  # here: the caller adds to the list between two batches
            report(len(samples) + len(unusable))
            if samples:
                yield samples, torch.stack(images)


def _batches(decoded, batch: int) -> Iterator[tuple[list[Sample], list[torch.Tensor], list[Refused]]]:
    """Up to ``batch`` samples, their images, and what was refused among them."""
    samples, images, refused = [], [], []
    for sample, image in decoded:
        if image is None:
            refused.append(sample)
            continue
        samples.append(sample)
        images.append(image)
        if len(samples) == batch:
            yield samples, images, refused
            samples, images, refused = [], [], []
    if samples or refused:
        yield samples, images, refused


def _in_order(
    samples: Iterator[tuple[int, Sample | Refused]], work: Callable, decoders: Executor, ahead: int
) -> Iterator:
    """What ``work`` makes of chunks of ``samples``, one by one in their order; ``ahead`` chunks are under way."""
    coming = deque()
    for chunk in iter(lambda: list(islice(samples, CHUNK)), []):
        coming.append(decoders.submit(work, chunk))
        if len(coming) > ahead:
            yield from coming.popleft().result()
    while coming:
        yield from coming.popleft().result()


def decode(
    samples: Iterable[tuple[int, Sample | Refused]], size: int, crop: str, guard: DecodingGuard | None = None
) -> list[tuple]:
    """(sample, its image uint8 [3, size, size]) of each of the numbered ``samples``, or (Refused, None)."""
    decoded = []
    for number, sample in samples:
        if guard and number in guard.reasons:
            sample = Refused(sample.name, guard.reasons[number])
        if isinstance(sample, Refused):
            decoded.append((sample, None))
            continue
        try:
            with guard.decoding(number) if guard else nullcontext():
                decoded.append((sample, _square(sample, size, crop)))
        except UnreadableImage as error:
            decoded.append((Refused(sample.name, str(error)), None))
    return decoded


def _square(sample: Sample, size: int, crop: str) -> torch.Tensor:
    """The image of ``sample`` as uint8 [3, size, size]. Raises UnreadableImage."""
    if crop == MoVQGAN.crop:  # from all pixels of the file, as the original does
        return prepare(sample.image(max(size, WHOLE)), size)
    return to_tensor(fit_square(sample.image(size), size, crop))
