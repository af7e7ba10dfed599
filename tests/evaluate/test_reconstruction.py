"""Reconstruction: PSNR and SSIM of scikit-image, and the record of real tokenizers."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from megat2i.data.images import fit_square, to_tensor
from megat2i.evaluate.quality import FeatureNet
from megat2i.evaluate.reconstruction import measure_reconstruction, psnr, ssim
from megat2i.tokenizers.patch import PatchTokenizer

SCIKIT = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255, "channel_axis": 2}


@pytest.fixture(scope="module")
def pairs(photo) -> list[tuple[Image.Image, Image.Image]]:
    noise = np.random.default_rng(1).integers(-30, 30, (40, 53, 3))
    noisy = Image.fromarray((np.asarray(photo) + noise).clip(0, 255).astype(np.uint8))
    return [(photo, noisy), (photo, photo.filter(ImageFilter.GaussianBlur(1))), (photo, photo.rotate(180))]


@pytest.mark.parametrize("number", range(3))
def test_the_numbers_of_scikit_image(pairs, number):
    image, copy = pairs[number]
    tensors = to_tensor(image)[None], to_tensor(copy)[None]
    arrays = np.asarray(image), np.asarray(copy)
    assert psnr(*tensors)[0] == pytest.approx(peak_signal_noise_ratio(*arrays, data_range=255), abs=1e-9)
    expected = structural_similarity(*arrays, **SCIKIT)
    assert ssim(*tensors)[0] == pytest.approx(expected, abs=1e-9)
    # What the comparison has to notice: another window, and the covariance of a sample.
    assert abs(structural_similarity(*arrays, **SCIKIT | {"gaussian_weights": False}) - expected) > 1e-3
    assert abs(structural_similarity(*arrays, **SCIKIT | {"use_sample_covariance": True}) - expected) > 1e-6


def test_every_image_has_its_own_number(pairs):
    images, copies = (torch.stack([to_tensor(image) for image in side]) for side in zip(*pairs, strict=True))
    for measure in (psnr, ssim):
        together = measure(images, copies)
        alone = [float(measure(images[i : i + 1], copies[i : i + 1])) for i in range(3)]
        assert together.tolist() == pytest.approx(alone) and together.dtype == torch.float64


def test_the_ends_of_the_scales(photo):
    image = to_tensor(photo)[None]
    black = torch.zeros_like(image)
    assert psnr(image, image).item() == 100 and ssim(image, image).item() == pytest.approx(1)
    assert psnr(black, black + 255).item() == 0
    with pytest.raises(ValueError, match="SSIM needs 11"):
        ssim(image[..., :10], image[..., :10])


@pytest.fixture(scope="module")
def folder(drawings, tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures")
    for number, picture in enumerate(drawings[:60]):
        picture.crop((0, 0, 48, 40)).save(path / f"{number:02d}.png")
    return path


def test_the_record_of_a_tokenizer(folder, drawings):
    squares = [fit_square(picture.crop((0, 0, 48, 40)), 32, "pad") for picture in drawings[:60]]
    images = torch.stack([to_tensor(square) for square in squares])
    net = FeatureNet.open("nano", None, batch_size=7)
    coarse, fine = (PatchTokenizer.fit(images, 8, codes) for codes in (4, 300))
    found = measure_reconstruction(folder, coarse, "pad", net)
    codes = coarse.encode(images)
    copies = coarse.decode(codes)
    assert found["psnr"] == pytest.approx(float(psnr(images, copies).mean()))
    assert found["ssim"] == pytest.approx(float(ssim(images, copies).mean()))
    share = np.bincount(codes.flatten(), minlength=4) / codes.numel()
    perplexity = np.exp(-sum(p * np.log(p) for p in share if p))
    assert found["codebook"] == {"codebook_size": 4, "used": (share > 0).sum(), "perplexity": pytest.approx(perplexity)}
    assert found["images"]["images"] == 60 and found["interval"] is None
    about = found["image_tokenizer"]
    assert (about["kind"], about["crop"], about["codebook_size"]) == ("patch", "pad", 4)
    better = measure_reconstruction(folder, fine, "pad", net)
    assert better["psnr"] > found["psnr"] + 3 and better["ssim"] > found["ssim"] and better["fid"] < found["fid"] / 2
    cut = measure_reconstruction(folder, coarse, "center", net)
    assert cut["psnr"] != found["psnr"], "the crop does nothing"
