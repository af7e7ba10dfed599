"""Precision and recall of generated images by nearest neighbours of features (Kynkäänniemi et al., 2019)."""

import torch
from torch import Tensor

NEIGHBOURS = 3
DISTANCES = 2**25  # held at once


def precision_recall(generated: Tensor, reference: Tensor) -> tuple[float, float]:
    """(precision, recall) of features [N, D] and [M, D], N and M > NEIGHBOURS.

    Precision is the share of generated vectors within the manifold of the reference, recall the share of reference
    vectors within that of the generated ones. A manifold is the union of balls around its vectors, each reaching to the
    vector's NEIGHBOURS-th nearest other one.
    """
    for features in (generated, reference):
        if len(features) <= NEIGHBOURS:
            raise ValueError(f"{len(features)} images: precision and recall need more than {NEIGHBOURS} of either kind")
    generated, reference = generated.double(), reference.double()
    return _share_within(generated, reference), _share_within(reference, generated)


def _share_within(features: Tensor, manifold: Tensor) -> float:
    rows = max(1, DISTANCES // len(manifold))
    # A vector is its own nearest: hence one more.
    radii = torch.cat([torch.cdist(block, manifold).kthvalue(NEIGHBOURS + 1).values for block in manifold.split(rows)])
    inside = [(torch.cdist(block, manifold) <= radii).any(dim=1) for block in features.split(rows)]
    return float(torch.cat(inside).double().mean())
