"""What an image tokenizer loses: PSNR, SSIM and FID of images that went to codes and back, and its use of the codes."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from megat2i.data.codebook_use import CodebookUse
from megat2i.data.images import fit_square, to_tensor
from megat2i.evaluate.image_folder import ImageFolder
from megat2i.evaluate.protocol import prepare
from megat2i.evaluate.quality import DEVICE, FeatureNet, batches, compare, record
from megat2i.progress import progress
from megat2i.tokenizers.image import ImageTokenizer
from megat2i.tokenizers.movqgan import MoVQGAN
from megat2i.tokenizers.movqgan import prepare as prepare_movq

WINDOW, SIGMA = 11, 1.5  # of SSIM, in pixels
EXACT = 100.0  # dB: what an image counts that comes back without a fault
METHODS = {
    "psnr": f"dB over all channels, mean over images, at most {EXACT:g}; uint8, peak 255",
    "ssim": f"Wang et al. 2004; Gaussian {WINDOW} x {WINDOW}, sigma {SIGMA}; mean over channels, places inside, images",
}


def psnr(images: Tensor, copies: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, float64 [B], of ``copies`` uint8 [B, 3, H, W]; EXACT at most."""
    error = (images.double() - copies.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(255**2 / error)).clamp(max=EXACT)


def ssim(images: Tensor, copies: Tensor) -> Tensor:
    """Structural similarity, float64 [B], of ``copies`` uint8 [B, 3, H, W] of at least WINDOW pixels a side."""
    if min(images.shape[-2:]) < WINDOW:
        raise ValueError(f"images of {images.shape[-1]} x {images.shape[-2]} pixels: SSIM needs {WINDOW} a side")
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=images.device) - WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    weights = (weights / weights.sum()).expand(3, 1, 1, -1)

    def local(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, weights, groups=3), weights.mT, groups=3)

    x, y = images.double(), copies.double()
    mean_x, mean_y = local(x), local(y)
    variances = local(x * x) - mean_x**2 + local(y * y) - mean_y**2
    covariance = local(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))
    return similarity.flatten(1).mean(1)


def measure_reconstruction(folder: Path, tokenizer: ImageTokenizer, crop: str, net: FeatureNet) -> dict:
    """The record of the images in ``folder`` as ``tokenizer`` gives them back, and of how many codes that took.

    crop: how the images become square: see ``data.images.fit_square``, or MoVQGAN's own. Raises DataFileError.
    """
    tokenizer, images, size = tokenizer.to(DEVICE), ImageFolder.open(folder), tokenizer.image_size
    square = prepare_movq if crop == MoVQGAN.crop else lambda image, size: to_tensor(fit_square(image, size, crop))
    ratios, similarities, features, counts = [], [], ([], []), np.zeros(tokenizer.codebook_size, np.int64)
    prepared = images.prepared(lambda image: square(image, size))
    shown = progress(prepared, f"measuring {folder}", "images", len(images.names))
    for originals in map(torch.stack, batches(shown, net.batch_size)):
        codes = tokenizer.encode(originals)
        copies = tokenizer.decode(codes)
        counts += np.bincount(codes.flatten(), minlength=len(counts))
        ratios.append(psnr(originals, copies))
        similarities.append(ssim(originals, copies))
        for seen, part in zip(features, (copies, originals), strict=True):
            arrays = part.permute(0, 2, 3, 1).contiguous().numpy()
            seen.append(net.features(prepare(Image.fromarray(array), net.protocol) for array in arrays))
    quality = {"psnr": float(torch.cat(ratios).mean()), "ssim": float(torch.cat(similarities).mean())}
    # Without an interval: resampling one of two sets that belong together image by image would say nothing.
    quality |= compare(torch.cat(features[0]), torch.cat(features[1]), net, replicates=0)
    names = ("kind", "sha256", "image_size", "encoder_precision", "codebook_size", "grid")
    about = {name: getattr(tokenizer, name) for name in names} | {"crop": crop}
    use = CodebookUse(counts)
    codebook = {"codebook_size": len(counts), "used": use.used, "perplexity": use.perplexity}
    images = images.description()
    measured = {"methods": METHODS, "codebook": codebook, "image_tokenizer": about, "images": images}
    return {"measure": "reconstruction"} | quality | measured | record()
