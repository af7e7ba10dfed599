"""Features of small pictures without a trained network: colours and edges at four scales, in 156 numbers.

For tests, and for experiments too small for Inception. A distance over these features says which of two sets of
pictures is nearer to a reference; it is no FID that anybody else computes. Nothing in it is random or trained, and it
computes in float64, so it is the same everywhere.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

SIZE = 64  # pixels a side
LABEL = "small (not Inception: not comparable with published FID)"
SCALES = 4
RANGE = 10.0  # of a pixel: what the size of the distances follows from


def small_features(images: Tensor) -> Tensor:
    """Features float64 [B, 156] of ``images`` [B, 3, 64, 64] in -1 .. 1."""
    red, green, blue = ((images.double() + 1) * (RANGE / 2)).unbind(1)
    # Brightness and two differences of colours, as eyes have them: a change of colour is then no change of brightness.
    channels = torch.stack(((red + green + blue) / 3, (red - green) / 2, (red + green) / 4 - blue / 2), dim=1)
    features = [F.adaptive_avg_pool2d(channels, 4).flatten(1)]  # where the colours are
    for _ in range(SCALES):
        here = channels[..., :-1, :-1]
        right, below = channels[..., :-1, 1:], channels[..., 1:, :-1]
        across = channels[..., 1:, 1:]
        edges = torch.stack((right - here, below - here, across - here, below - right), dim=1).abs()
        features.append(edges.mean((-1, -2)).flatten(1))
        features.append(edges.square().mean((-1, -2)).sqrt().flatten(1))  # few strong edges, or many weak ones
        features.append(channels.std((-1, -2)))
        channels = F.avg_pool2d(channels, 2)
    return torch.cat(features, dim=1)
