"""How often a generated picture is nearer to its own true picture than to other pictures.

A cheap measure that needs no pre-trained network: for every prompt, the distance of the generated picture to its true
picture is compared with its distances to ``OTHERS`` other true pictures. Without any relation the rate is the chance
level 1 / (1 + OTHERS).
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

OTHERS = 9


def pixel_space(images: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] uint8 as float32 vectors [N, 3 * H * W] in 0 .. 1."""
    return images.float().flatten(1) / 255


def feature_space(images: Tensor) -> Tensor:
    """Colour layout and edge directions of pictures [N, 3, H, W] uint8, as float32 vectors [N, 320].

    An 8 x 8 layout of mean colours (192 numbers) and, in 4 x 4 cells, the strength of edges in 8 directions (128
    numbers): what a picture is like, with less regard for where exactly each pixel is.
    """
    pictures = images.float() / 255
    layout = F.adaptive_avg_pool2d(pictures, 8).flatten(1)
    grey = pictures.mean(dim=1, keepdim=True)
    horizontal = F.pad(grey, (0, 1, 0, 0), mode="replicate").diff(dim=3)
    vertical = F.pad(grey, (0, 0, 0, 1), mode="replicate").diff(dim=2)
    strength = (horizontal.square() + vertical.square()).sqrt()
    direction = ((torch.atan2(vertical, horizontal) / torch.pi + 1) * 4).long() % 8
    by_direction = torch.cat([strength * (direction == number) for number in range(8)], dim=1)
    edges = F.adaptive_avg_pool2d(by_direction, 4).flatten(1)
    return torch.cat((layout, 4 * edges), dim=1)


def nearest_to_own(generated: Tensor, true: Tensor, seed: int = 0) -> dict[str, float | int]:
    """Rate at which generated[i] is strictly nearer to true[i] than to each of OTHERS other rows of ``true``.

    generated, true [N, features], N > OTHERS. Returns ``rate``, ``chance`` and ``n``.
    """
    count = len(true)
    if generated.shape != true.shape or count <= OTHERS:
        raise ValueError(
            f"need as many generated as true pictures and more than {OTHERS}: {generated.shape}, {true.shape}"
        )
    distances = torch.cdist(generated.double(), true.double())
    random = np.random.default_rng(seed)
    wins = 0
    for index in range(count):
        others = random.choice(np.delete(np.arange(count), index), OTHERS, replace=False)
        wins += bool((distances[index, index] < distances[index, torch.from_numpy(others)]).all())
    return {"rate": wins / count, "chance": 1 / (1 + OTHERS), "n": count}


def quality(generated: Tensor, true: Tensor) -> dict[str, dict[str, float | int]]:
    """``nearest_to_own`` of pictures [N, 3, H, W] uint8 in both spaces."""
    return {
        "pixel": nearest_to_own(pixel_space(generated), pixel_space(true)),
        "feature": nearest_to_own(feature_space(generated), feature_space(true)),
    }
