"""The Fréchet distance between two sets of feature vectors (Heusel et al., 2017), and how far chance moves it.

Everything is float64. The trace of the matrix root is taken over eigenvalues of a symmetric matrix: a general matrix
root (scipy.linalg.sqrtm) fails on covariances of few images, which are singular.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megat2i.progress import progress

BLOCK = 4096  # feature vectors converted to float64 at once


@dataclass
class FeatureStatistics:
    """Mean and covariance of feature vectors that come in pieces; parts from several processes are merged."""

    count: int = 0
    mean: Tensor | float = 0.0  # [D] float64
    scatter: Tensor | float = 0.0  # [D, D] float64: sum of outer products of deviations from the mean

    @classmethod
    def of(cls, features: Tensor) -> "FeatureStatistics":
        """The statistics of ``features`` [N, D]."""
        result = cls()
        for block in features.split(BLOCK):
            result.add(block)
        return result

    def add(self, features: Tensor) -> None:
        """Take in ``features`` [N, D] of any floating-point dtype."""
        values = features.double()
        centred = values - values.mean(0)
        self.merge(FeatureStatistics(len(values), values.mean(0), centred.T @ centred))

    def merge(self, other: "FeatureStatistics") -> None:
        """Take in the statistics of other vectors (Chan, Golub and LeVeque, 1979)."""
        total = self.count + other.count
        apart = torch.as_tensor(other.mean - self.mean)
        between = torch.outer(apart, apart) * (self.count * other.count / total)
        self.scatter = self.scatter + other.scatter + between
        self.mean = self.mean + apart * (other.count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """[D, D], unbiased. ValueError with fewer than two vectors."""
        if self.count < 2:
            raise ValueError(f"{self.count} feature vectors have no covariance: at least 2 images are needed")
        return self.scatter / (self.count - 1)


def frechet_distance(mean1, covariance1, mean2, covariance2) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of means [D] and covariances [D, D], arrays or tensors."""
    mean1, covariance1, mean2, covariance2 = (
        torch.as_tensor(value, dtype=torch.float64) for value in (mean1, covariance1, mean2, covariance2)
    )
    return _distance(mean1, covariance1, mean2, covariance2, _square_root(covariance2))


def bootstrap_deviation(features: Tensor, reference: FeatureStatistics, replicates: int, seed: int = 0) -> float:
    """Standard deviation of the distance to ``reference`` over resamples, with replacement, of ``features`` [N, D]."""
    generator = torch.Generator().manual_seed(seed)
    covariance = reference.covariance
    root = _square_root(covariance)
    distances = []
    for _ in progress(range(replicates), "resampling for the interval", "resamples"):
        chosen = torch.randint(len(features), (len(features),), generator=generator).to(features.device)
        drawn = FeatureStatistics.of(features[chosen])
        distances.append(_distance(drawn.mean, drawn.covariance, reference.mean, covariance, root))
    return float(torch.tensor(distances).std())


def _distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor, root2: Tensor) -> float:
    """tr (C1 C2)^(1/2) = tr (R C1 R)^(1/2) with R = C2^(1/2), which is symmetric."""
    eigenvalues = torch.linalg.eigvalsh(root2 @ covariance1 @ root2)
    shared = eigenvalues.clamp(min=0).sqrt().sum()  # negative ones are rounding errors
    return float((mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * shared)


def _square_root(covariance: Tensor) -> Tensor:
    if not covariance.isfinite().all():
        raise ValueError("a covariance of features is not finite: the feature net's weights or the images are damaged")
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
