"""k-means: finds clusters that are there, keeps centres apart, and does not depend on threads or order of merging."""

import pytest
import torch

from megat2i.tokenizers.kmeans import nearest, weighted_kmeans


def blobs(clusters=12, each=200, dimensions=12, spread=3):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randint(20, 236, (clusters, 1, dimensions), generator=generator)
    noise = torch.randint(-spread, spread + 1, (clusters, each, dimensions), generator=generator)
    return centres[:, 0], (centres + noise).reshape(-1, dimensions).to(torch.int16)


def squared_error(vectors, centres):
    return torch.cdist(vectors.double(), centres.double()).square().min(1).values.mean().item()


def test_separate_clusters_are_all_found():
    truth, vectors = blobs()
    found = weighted_kmeans(vectors, len(truth), seed=0)
    distance, match = torch.cdist(truth.double(), found.double()).min(1)
    assert sorted(match.tolist()) == list(range(len(truth)))
    assert distance.max() < 3
    # The control: the right number of centres, one of them in the wrong place, has a far larger error.
    assert squared_error(vectors, found) * 10 < squared_error(vectors, torch.cat([found[1:], found[1:2]]))


def test_lloyd_improves_on_random_centres():
    vectors = torch.randint(0, 256, (4000, 12), generator=torch.Generator().manual_seed(1)).to(torch.int16)
    assert squared_error(vectors, weighted_kmeans(vectors, 32, seed=0)) < 0.85 * squared_error(vectors, vectors[:32])


def test_threads_and_order_do_not_matter_and_the_seed_does():
    _, vectors = blobs()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = weighted_kmeans(vectors, 50, seed=0)
        torch.set_num_threads(2)
        two = weighted_kmeans(vectors.flip(0), 50, seed=0)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, two)
    assert not torch.equal(one, weighted_kmeans(vectors, 50, seed=1))


def test_centres_are_all_different_even_with_as_many_as_vectors():
    vectors = torch.tensor([[0], [1], [2], [3], [255], [255], [255]], dtype=torch.int16).repeat(1, 3)
    centres = weighted_kmeans(vectors, 5, seed=0)
    assert sorted(centres[:, 0].tolist()) == [0, 1, 2, 3, 255]
    with pytest.raises(ValueError, match="5 distinct patches, too few for a codebook of 6"):
        weighted_kmeans(vectors, 6, seed=0)


def test_nearest_is_exact_and_takes_the_first_of_equals():
    generator = torch.Generator().manual_seed(2)
    vectors = torch.randint(-255, 256, (500, 192), generator=generator).float()
    centres = torch.randint(-255, 256, (40, 192), generator=generator).float()
    centres[7] = vectors[0] = centres[3]
    index, errors = nearest(vectors, centres)
    exact = (vectors.double()[:, None] - centres.double()).square().sum(2)
    assert torch.equal(errors.double(), exact.min(1).values)
    assert 7 not in index and 3 in index
    assert torch.equal(exact.gather(1, index[:, None])[:, 0], exact.min(1).values)
