"""Fréchet distances: exact for Gaussians, torch-fidelity's for features, and a deviation that chance really has."""

import numpy as np
import pytest
import scipy.linalg
import torch

from megat2i.evaluate.fid import FeatureStatistics, bootstrap_deviation, frechet_distance


def random_features(count: int, size: int, seed: int) -> torch.Tensor:
    """Correlated, skewed vectors of uneven scales, float64 [count, size]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=torch.Generator().manual_seed(seed // 10), dtype=torch.float64)
    scales = torch.logspace(-2, 0, size, dtype=torch.float64)
    return (torch.randn(count, size, generator=generator, dtype=torch.float64) * scales) @ mixing / size**0.5 + seed % 3


def distance(features, reference, biased: bool = False, shared_mean: bool = False) -> float:
    first, second = FeatureStatistics.of(features), FeatureStatistics.of(reference)
    factor = (first.count - 1) / first.count if biased else 1
    mean = second.mean if shared_mean else first.mean
    return frechet_distance(mean, first.covariance * factor, second.mean, second.covariance)


def test_gaussians_whose_distance_is_known():
    size = 6
    generator = np.random.default_rng(0)
    turn = np.linalg.qr(generator.normal(size=(size, size)))[0]
    first, second = generator.uniform(0.1, 3, (2, size))
    zero, apart = np.zeros(size), generator.normal(size=size)
    turned = [turn @ np.diag(values**2) @ turn.T for values in (first, second)]
    assert frechet_distance(zero, turned[0], zero, turned[0]) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(zero, turned[0], apart, turned[0]) == pytest.approx(apart @ apart, rel=1e-12)
    expected = ((first - second) ** 2).sum() + apart @ apart
    assert frechet_distance(zero, turned[0], apart, turned[1]) == pytest.approx(expected, rel=1e-12)
    # Matrices that do not commute: in two dimensions tr (A B)^1/2 = (tr A B + 2 (det A B)^1/2)^1/2.
    a, b = np.array([[2.0, 0.3], [0.3, 0.5]]), np.array([[1.0, -0.6], [-0.6, 1.5]])
    shared = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    expected = np.trace(a) + np.trace(b) - 2 * shared
    assert frechet_distance(zero[:2], a, zero[:2], b) == pytest.approx(expected, rel=1e-12)
    # No spread at all against some.
    assert frechet_distance(zero, np.zeros((size, size)), zero, turned[0]) == pytest.approx((first**2).sum())


@pytest.mark.parametrize(("count", "size"), [(600, 64), (90, 128)], ids=["full rank", "singular"])
def test_the_same_as_torch_fidelity_and_the_matrix_root(torch_fidelity, count, size):
    features, reference = random_features(count, size, 1), random_features(count + 50, size, 12)
    found = distance(features, reference)
    assert found == pytest.approx(torch_fidelity.fid(features, reference), abs=1e-3)
    if count > size:  # where the root exists
        covariances = [np.cov(values.numpy(), rowvar=False) for values in (features, reference)]
        root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
        apart = (features.mean(0) - reference.mean(0)).square().sum()
        assert found == pytest.approx(float(apart) + np.trace(sum(covariances) - 2 * root), abs=1e-6)
    # What such a comparison has to notice.
    assert abs(distance(features, reference, biased=True) - found) > 3e-3
    assert abs(distance(features, reference, shared_mean=True) - found) > 0.1


def test_statistics_do_not_depend_on_the_pieces():
    features = random_features(301, 20, 5) + 1e4  # far from zero, where E x^2 - (E x)^2 loses its digits
    parts = [FeatureStatistics(), FeatureStatistics()]
    for number, piece in enumerate(features.split([1, 40, 100, 160])):
        parts[number % 2].add(piece)
    parts[0].merge(parts[1])
    assert parts[0].count == 301
    assert torch.allclose(parts[0].mean, features.mean(0), rtol=0, atol=1e-9)
    assert torch.allclose(parts[0].covariance, torch.cov(features.T), rtol=0, atol=1e-9)
    narrow = FeatureStatistics.of(features.float())
    assert narrow.covariance.dtype == torch.float64


def test_the_deviation_is_that_of_other_images():
    """Over really new samples the distance varies as much as the resamples of one say, to a third."""
    generator = torch.Generator().manual_seed(0)
    reference = FeatureStatistics.of(torch.randn(3000, 8, generator=generator))

    def sample() -> torch.Tensor:
        return 1.2 * torch.randn(300, 8, generator=generator) + 0.3

    drawn = [FeatureStatistics.of(sample()) for _ in range(200)]
    distances = [frechet_distance(s.mean, s.covariance, reference.mean, reference.covariance) for s in drawn]
    true = float(np.std(distances, ddof=1))
    found = [bootstrap_deviation(sample(), reference, 60, seed) for seed in range(5)]
    assert 0.7 * true < np.mean(found) < 1.4 * true
    features = sample()
    assert bootstrap_deviation(features, reference, 20) == bootstrap_deviation(features, reference, 20)


def test_what_has_no_distance_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        _ = FeatureStatistics.of(torch.ones(1, 3)).covariance
    damaged = FeatureStatistics.of(torch.tensor([[1.0, 2.0], [float("nan"), 1.0], [2.0, 2.0]]))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(damaged.mean, damaged.covariance, damaged.mean, damaged.covariance)
