"""The demo's measure: certain for perfect pictures, at chance for unrelated ones."""

import pytest
import torch

from megat2i.evaluate.retrieval import OTHERS, feature_space, nearest_to_own, pixel_space, quality


@pytest.fixture(scope="module")
def pictures():
    """200 smooth pictures of 24 x 24 pixels."""
    small = torch.rand(200, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 255
    return torch.nn.functional.interpolate(small, size=24, mode="bilinear").round().to(torch.uint8)


def test_perfect_pictures_are_always_nearest_to_their_own(pictures):
    result = quality(pictures, pictures)
    assert result == {space: {"rate": 1.0, "chance": 0.1, "n": 200} for space in ("pixel", "feature")}


def test_noisy_pictures_are_nearest_to_their_own(pictures):
    noise = torch.randint(-40, 41, pictures.shape, generator=torch.Generator().manual_seed(1))
    result = quality((pictures + noise).clamp(0, 255).to(torch.uint8), pictures)
    assert result["pixel"]["rate"] > 0.95 and result["feature"]["rate"] > 0.8


def test_pictures_of_other_prompts_are_at_chance(pictures):
    """The control: without a relation the rate is 1 in 10, not more."""
    result = quality(pictures.roll(1, 0), pictures)
    assert all(0 <= values["rate"] < 0.2 for values in result.values())
    unrelated = torch.rand(200, 8, generator=torch.Generator().manual_seed(2))
    true = torch.rand(200, 8, generator=torch.Generator().manual_seed(3))
    assert 0.02 < nearest_to_own(unrelated, true)["rate"] < 0.2


def test_one_picture_for_all_prompts_is_at_chance(pictures):
    blank = torch.full_like(pictures, 255)
    assert all(values["rate"] < 0.2 for values in quality(blank, pictures).values())


def test_a_tie_does_not_count(pictures):
    same = pictures[:1].expand(OTHERS + 1, -1, -1, -1)
    assert nearest_to_own(pixel_space(same), pixel_space(same))["rate"] == 0


def test_features_see_colour_and_direction():
    dark, light = torch.zeros(1, 3, 24, 24, dtype=torch.uint8), torch.full((1, 3, 24, 24), 255, dtype=torch.uint8)
    upright, lying = dark.clone(), dark.clone()
    upright[..., 12:], lying[..., 12:, :] = 255, 255
    features = feature_space(torch.cat((dark, light, upright, lying)))
    assert features.shape == (4, 320) and features.isfinite().all()
    assert (torch.pdist(features) > 0.1).all()
    assert not torch.equal(features[2, 192:], features[3, 192:]), "edges of two directions look the same"


def test_too_few_pictures_are_refused(pictures):
    with pytest.raises(ValueError, match="more than 9"):
        quality(pictures[:OTHERS], pictures[:OTHERS])
