"""What the demo's model draws, beside what it should draw: prompts of the training and of the held-out pictures."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megat2i.config import Config, SamplingConfig
from megat2i.data.images import to_tensor
from megat2i.data.indexed import IndexedDataset
from megat2i.data.openmoji import Drawing, captioned_images, render
from megat2i.drawn import DrawnStep
from megat2i.evaluate.retrieval import pixel_space, quality
from megat2i.generate import Sampler
from megat2i.pictures import sheet
from megat2i.progress import Progress, progress
from megat2i.tokenizers.image import ImageTokenizer

SEEN, UNSEEN = 200, 100  # prompts that are measured
SHOWN = 16  # of each kind
SHOWN_STEPS = 6  # of those that the run drew its prompts at
SEED = 0
BATCH_SIZE = 50  # pictures drawn at a time: half the processor time of 25, and 150 saves little more
EMPTY_RANGE = 8  # of 255: a picture whose channels all vary by less is of one color
SHEET_SIDE = 96  # pixels of a picture on a sheet
README_SHOWN = 8


@dataclass(frozen=True)
class Samples:
    """Prompts of one split, and of each of them pictures [N, 3, H, W] uint8.

    generated: by the model. reconstructed: the true picture as the image tokenizer's codes show it, the best that the
    model can do. true: as OpenMoji's font draws it.
    """

    drawings: list[Drawing]
    generated: Tensor
    reconstructed: Tensor
    true: Tensor

    @property
    def captions(self) -> list[str]:
        return [drawing.caption for drawing in self.drawings]

    def empty(self) -> list[bool]:
        """Which generated pictures are of one color although the true ones are not."""
        return (one_color(self.generated) & ~one_color(self.true)).tolist()

    def measures(self) -> dict:
        """Both measures of the generated pictures, the same of the reconstructed ones, and the number of empty ones."""
        empty = self.empty()
        counts = {"empty": sum(empty), "empty_shown": sum(empty[:SHOWN])}
        return quality(self.generated, self.true) | {"codebook": quality(self.reconstructed, self.true)} | counts


def one_color(images: Tensor) -> Tensor:
    """Which of ``images`` [N, 3, H, W] uint8 are of one color: bool [N]."""
    pixels = images.flatten(2)
    spread = pixels.amax(dim=2).int() - pixels.amin(dim=2).int()  # [N, 3]
    return (spread < EMPTY_RANGE).all(dim=1)


def sample_splits(sampler: Sampler, sampling: SamplingConfig) -> dict[str, Samples]:
    """What is drawn for SEEN prompts of the training pictures and UNSEEN of the held-out ones."""
    with Progress(None, "reading OpenMoji's font", ""):
        chosen = {"seen": choose("small-train", SEEN), "unseen": choose("small-valid", UNSEEN)}
    everything = [drawing for drawings in chosen.values() for drawing in drawings]
    generated = draw(sampler, sampling, [drawing.caption for drawing in everything])
    tokenizer = sampler.image_tokenizer
    true = true_pictures(everything, tokenizer.image_size)
    reconstructed = tokenizer.decode(tokenizer.encode(true))
    samples, start = {}, 0
    for name, drawings in chosen.items():
        rows = slice(start, start + len(drawings))
        samples[name] = Samples(drawings, generated[rows], reconstructed[rows], true[rows])
        start = rows.stop
    return samples


def choose(split: str, count: int) -> list[Drawing]:
    """A fixed random choice of ``count`` pictures of a split."""
    return random.Random(SEED).sample(captioned_images(split), count)


def draw(sampler: Sampler, sampling: SamplingConfig, prompts: Sequence[str]) -> Tensor:
    """One picture [N, 3, H, W] uint8 for each prompt."""
    pictures = []
    with Progress(len(prompts), "drawing prompts", "pictures") as shown:
        for start in range(0, len(prompts), BATCH_SIZE):
            batch = prompts[start : start + BATCH_SIZE]
            images = sampler.images(batch, [SEED] * len(batch), sampling, BATCH_SIZE)
            pictures.append(torch.from_numpy(images))
            shown.update(len(batch))
    return torch.cat(pictures)


def true_pictures(drawings: Sequence[Drawing], size: int) -> Tensor:
    """The drawings [N, 3, size, size] uint8 as the font makes them."""
    rendered = progress(drawings, "rendering true pictures", "pictures")
    return torch.stack([to_tensor(render(drawing.characters, size)) for drawing in rendered])


def training_pictures(settings: Config, tokenizer: ImageTokenizer) -> Tensor:
    """All training pictures [N, 3, H, W] uint8 as their codes show them: decoding is quick, rendering is not."""
    codes = []
    for dataset in settings.data.train:
        store = IndexedDataset(dataset.prefix)
        images = [store.sequence(store.document(number)[-1]) for number in range(store.number_of_documents)]
        codes.append(np.stack(images).astype(np.int64))
    return tokenizer.decode(torch.from_numpy(np.concatenate(codes)))


def samples_sheet(samples: dict[str, Samples], training: Tensor, sampling: SamplingConfig) -> Image.Image:
    """Beside each generated picture the training picture that is nearest to it in pixels."""
    vectors, cells = pixel_space(training), []
    for name, prefix in (("seen", ""), ("unseen", "held out: ")):
        generated = samples[name].generated[:SHOWN]
        nearest = torch.cdist(pixel_space(generated), vectors).argmin(dim=1)
        for caption, image, other in zip(samples[name].captions, generated, training[nearest], strict=False):
            cells.append((prefix + caption, [image.numpy(), other.numpy()]))
    title = (
        f"left: generated, right: nearest training picture. guidance {sampling.guidance}, temperature "
        f"{sampling.temperature}, top-k {sampling.top_k}, top-p {sampling.top_p}, seed {SEED}"
    )
    return sheet(cells, columns=8, side=SHEET_SIDE, title=title)


def chosen_steps(steps: Sequence[DrawnStep]) -> list[DrawnStep]:
    """At most SHOWN_STEPS of those ``steps`` that drew the last one's prompts, evenly spread, both ends included."""
    same = [step for step in steps if step.prompts == steps[-1].prompts]
    if len(same) <= SHOWN_STEPS:
        return same
    return [same[round(position)] for position in np.linspace(0, len(same) - 1, SHOWN_STEPS)]


def readme_sheets(samples: dict[str, Samples], steps: Sequence[DrawnStep]) -> dict[str, Image.Image]:
    """The README's pictures by file name: samples beside the true pictures, and the same prompts at several steps."""
    cells = []
    for name, prefix in (("seen", ""), ("unseen", "held out: ")):
        part = samples[name]
        for number in range(README_SHOWN):
            pictures = [part.generated[number].numpy(), part.true[number].numpy()]
            cells.append((prefix + part.captions[number], pictures))
    sheets = {"demo-samples.png": sheet(cells, columns=4, side=SHEET_SIDE, title="left: generated, right: OpenMoji")}
    steps = chosen_steps(steps)
    if steps:
        prompts = enumerate(steps[-1].prompts)
        cells = [(prompt, [step.images[number] for step in steps]) for number, prompt in prompts]
        numbers = ", ".join(f"{step.step:,}" for step in steps)
        sheets["demo-steps.png"] = sheet(cells, columns=2, side=SHEET_SIDE, title=f"after {numbers} steps")
    return sheets
