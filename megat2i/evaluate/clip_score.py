"""CLIP score: cosine of the embeddings of an image and of its prompt, by a CLIP model in a folder on the disk.

As GigaGAN's evaluation.py has it: the prompt behind "A photo depicts ", the plain cosine, no factor and no floor.
(Hessel et al., 2021, report 2.5 max(cosine, 0); others 100 times the cosine.)
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megat2i.config import ConfigError
from megat2i.evaluate.image_folder import ImageFolder
from megat2i.evaluate.quality import BATCH_SIZE, DEVICE, batches, record
from megat2i.files import DataFileError
from megat2i.progress import progress
from megat2i.tokenizers.vq_tokenizer import arithmetic
from megat2i.weights_file import SINGLE, file_sha256

PREFIX = "A photo depicts "
# Of the pixels in 0 .. 1: those of all models of OpenAI's and of open_clip's.
MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@torch.inference_mode()
def clip_score(generated: Path, weights: Path, prefix: str = PREFIX, batch_size: int = BATCH_SIZE) -> dict:
    """The mean over the images of a folder of tools/generate.py, with how it was measured.

    weights: a folder of Hugging Face's layout with a CLIPModel: config.json, tokenizer files, model.safetensors.
    Raises ConfigError without the package transformers, DataFileError for a folder that is not what it should be.
    """
    try:
        from transformers import AutoTokenizer, CLIPModel
    except ImportError as error:
        raise ConfigError(f"a CLIP score needs the package transformers ({error})") from error
    images = ImageFolder.open(generated)
    if images.prompts is None:
        raise DataFileError(generated, "has no samples.jsonl, so no prompts", "Pass a folder of tools/generate.py")
    sha256 = file_sha256(weights / SINGLE)
    try:
        model = CLIPModel.from_pretrained(weights, local_files_only=True, use_safetensors=True, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(weights, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataFileError(
            weights, f"not a CLIPModel with its tokenizer ({error})", "Pass its whole folder"
        ) from error
    model, side = model.eval().to(DEVICE), model.config.vision_config.image_size
    length, scores = model.config.text_config.max_position_embeddings, []
    prepared = images.prepared(lambda image: _prepare(image, side))
    pixels = progress(prepared, f"measuring {generated}", "images", len(images.names))
    with arithmetic(torch.device(DEVICE), "ieee"):
        for chunk, texts in zip(batches(pixels, batch_size), batches(images.prompts, batch_size), strict=True):
            captions = [prefix + text for text in texts]
            tokens = tokenizer(captions, padding=True, truncation=True, max_length=length, return_tensors="pt")
            found = model(pixel_values=torch.stack(chunk).to(DEVICE), **tokens.to(DEVICE))
            scores.append(torch.cosine_similarity(found.image_embeds, found.text_embeds).double().cpu())
    score = torch.cat(scores)
    return {
        "measure": "clip-score",
        "clip_score": float(score.mean()),
        "standard_error": float(score.std() / len(score) ** 0.5),
        "scale": "cosine, neither multiplied nor cut off at 0",
        "prefix": prefix,
        "model": {"folder": str(weights), "sha256": sha256, "image_size": side},
        "resize": "short side by bicubic, Pillow, uint8, then center crop",
        "generated": images.description(),
        **record(),
    }


def _prepare(image: Image.Image, side: int) -> Tensor:
    """float32 [3, side, side] as CLIP's own preprocessing makes it."""
    short = min(image.size)
    image = image.resize([side * length // short for length in image.size], Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in image.size)
    pixels = np.asarray(image.crop((left, top, left + side, top + side)), np.float32) / 255
    return torch.from_numpy((pixels - np.float32(MEAN)) / np.float32(DEVIATION)).permute(2, 0, 1)
