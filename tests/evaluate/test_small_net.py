"""The small feature net: worse pictures are farther away, step by step, for every way of getting worse."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from megat2i.evaluate.fid import FeatureStatistics, frechet_distance
from megat2i.evaluate.protocol import PROTOCOLS, prepare
from megat2i.evaluate.small_net import LABEL, small_features

GENERATOR = np.random.default_rng(0)


def noisy(picture: Image.Image, deviation: float) -> Image.Image:
    pixels = np.asarray(picture)
    return Image.fromarray((pixels + GENERATOR.normal(0, deviation, pixels.shape)).clip(0, 255).astype(np.uint8))


def blurred(picture: Image.Image, radius: float) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(radius))


def recoloured(picture: Image.Image, share: float) -> Image.Image:
    """Red, green and blue exchanged in a circle, by a share."""
    pixels = np.asarray(picture, np.float64)
    return Image.fromarray(((1 - share) * pixels + share * pixels[..., [1, 2, 0]]).round().astype(np.uint8))


def shuffled(picture: Image.Image, patches: int) -> Image.Image:
    """So many of the 64 patches of 6 x 6 pixels in each other's places."""
    grid = np.asarray(picture).reshape(8, 6, 8, 6, 3).transpose(0, 2, 1, 3, 4).reshape(64, 6, 6, 3).copy()
    chosen = GENERATOR.choice(64, patches, replace=False)
    grid[chosen] = grid[np.roll(chosen, 1)]
    return Image.fromarray(grid.reshape(8, 8, 6, 6, 3).transpose(0, 2, 1, 3, 4).reshape(48, 48, 3))


def statistics(pictures: list[Image.Image]) -> FeatureStatistics:
    prepared = torch.stack([prepare(picture, PROTOCOLS["nano"]) for picture in pictures])
    return FeatureStatistics.of(small_features(prepared))


@pytest.fixture(scope="module")
def distance(drawings):
    """Function of pictures: their distance to 150 other ones."""
    reference = statistics(drawings[:150])

    def measure(pictures: list[Image.Image]) -> float:
        found = statistics(pictures)
        return frechet_distance(found.mean, found.covariance, reference.mean, reference.covariance)

    return measure


@pytest.mark.parametrize(
    ("worsen", "degrees"),
    [(noisy, (10, 20, 40)), (blurred, (0.5, 1, 2, 4)), (recoloured, (0.25, 0.5, 1)), (shuffled, (8, 24, 64))],
)
def test_worse_pictures_are_farther_away(drawings, distance, worsen, degrees):
    clean = drawings[150:]
    distances = [distance(clean)] + [distance([worsen(picture, degree) for picture in clean]) for degree in degrees]
    assert distances == sorted(distances), distances
    assert distances[1] > 1.05 * distances[0] and distances[-1] > 3 * distances[0], distances


def test_few_kinds_of_pictures_are_farther_away(drawings, distance):
    clean = drawings[150:]
    assert distance(clean[:10] * 15) > 2 * distance(clean)


EXPECTED = [2.447916666667, 1.25, 1.8359375, 1.112370468144, 0.833441727367, 2.645833333333, 2.718616011112]


def test_its_features_stay_what_they_are():
    """Numbers, so that results of this year can be compared with those of the next; any machine gives them."""
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    image = torch.stack((rows / 32 - 1, columns / 32 - 1, ((rows // 8 + columns // 8) % 2) * 2 - 1))[None]
    features = small_features(image)[0]
    assert features.shape == (156,) and features.dtype == torch.float64 and "not Inception" in LABEL
    found = [float(features[index]) for index in (0, 20, 47, 60, 75, 110, 155)]
    assert found == pytest.approx(EXPECTED, abs=1e-9)
