"""k-means on vectors of small integers, reproducible bit for bit, for the codebook of PatchTokenizer.

Equal vectors are merged and weighted by their number: pictures repeat their plain patches thousands of times. Centres
are k-means++ samples, improved by Lloyd's iterations; an empty centre restarts at the worst represented vector. During
the iterations centres are kept on a grid of fractions so coarse that float32 dot products with them are exact:
results then depend neither on the machine nor on the number of threads.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from megat2i.progress import Progress

LARGEST = 255  # magnitude of a component: sums of 258 products then stay exact in float32
CHUNK = 1024  # vectors per matrix product: their scores stay in the cache
ITERATIONS = 100
TOLERANCE = 1e-2  # the least relative gain of an iteration; what remains then is below 0.1 dB
SEEDING_VECTORS = 1 << 16  # k-means++ reads all of them once per centre
CANDIDATES = 4  # greedy k-means++: the best of this many draws becomes the next center
DRAWN_AHEAD = 16  # centers whose candidates are drawn together, at most
FEW = 64  # times as many centers must be there before candidates of several are drawn together


def nearest(vectors: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each of ``vectors`` float32 [N, d]: index int64 [N] of the nearest of ``centres`` float32 [K, d] (the first of
    equals), and the squared distance to it, float32 [N]."""
    half_norms = centres.double().square().sum(1).div(2).float()
    scores = torch.addmm(-half_norms, vectors, centres.T)
    # NumPy's is ten times as fast as torch's on a CPU.
    index = scores.argmax(1) if scores.is_cuda else torch.from_numpy(scores.numpy().argmax(1))
    best = scores.gather(1, index[:, None])[:, 0]
    return index, vectors.square().sum(1) - 2 * best


def weighted_kmeans(
    vectors: torch.Tensor, clusters: int, seed: int, settle: Callable[[torch.Tensor], torch.Tensor] = torch.round
) -> torch.Tensor:
    """Centres float32 [clusters, d] of ``vectors`` int16 [N, d] (magnitudes up to LARGEST), all different.

    ``settle`` moves float32 centres to values that may stand in the result (default: whole numbers); it must leave
    every vector where it is. Raises ValueError where there are fewer distinct vectors than clusters.
    """
    points, weights = _distinct(vectors)
    if len(points) < clusters:
        problem = f"the images have {len(points):,} distinct patches, too few for a codebook of {clusters:,}"
        raise ValueError(f"{problem}: choose a smaller codebook or more images")
    generator = torch.Generator().manual_seed(seed)
    centres = _seed(points, weights, clusters, generator)
    step = 2.0 ** max(0, math.floor(math.log2(2**24 / (LARGEST * LARGEST * points.shape[1]))))
    last = math.inf
    with Progress(None, "improving the codes", "iterations") as shown:
        for _ in range(ITERATIONS):
            index, errors = _assign(points, centres)
            total = float((errors.double() * weights).sum())
            if total > last * (1 - TOLERANCE):
                break
            last = total
            centres = _means(points, weights, index, errors, clusters)
            centres = torch.round(centres * step) / step
            shown.update()
    return _settle_apart(centres, points, weights, settle)


def _distinct(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(distinct vectors, float32 [U, d]; how often each occurs, int64 [U]) in the order of their bytes."""
    rows = np.ascontiguousarray(vectors.numpy())
    unique, counts = np.unique(rows.view(np.dtype((np.void, rows[0].nbytes))).ravel(), return_counts=True)
    points = torch.from_numpy(unique.view(rows.dtype).reshape(len(unique), -1).astype(np.float32))
    return points, torch.from_numpy(counts)


def _seed(points: torch.Tensor, weights: torch.Tensor, clusters: int, generator: torch.Generator) -> torch.Tensor:
    """Greedy k-means++: ``clusters`` different points, each drawn in proportion to the error that it would remove.

    Candidates of several centers are drawn at once, from the errors before the first of them: one matrix product for
    all is many times faster than one for each, and few centers among many change the errors little.
    """
    if len(points) > max(SEEDING_VECTORS, clusters):
        sample = torch.randperm(len(points), generator=generator)[: max(SEEDING_VECTORS, clusters)]
        points, weights = points[sample], weights[sample]
    norms, transposed, weights = points.square().sum(1), points.T.contiguous(), weights.double()
    distances = torch.full((len(points),), torch.inf)
    candidates = weights.argmax()[None]  # the first center: the commonest vector, usually the background
    chosen: list[torch.Tensor] = []
    with Progress(clusters, "choosing the codes to begin with", "codes") as shown:
        while len(chosen) < clusters:
            products = points[candidates] @ transposed  # [candidates, U]
            squared = norms[candidates, None] - 2 * products + norms
            for number in range(0, len(candidates), CANDIDATES):
                after = torch.minimum(squared[number : number + CANDIDATES], distances)
                best = (after.double() @ weights).argmin()  # float64, and so exact: these are integers
                distances = after[best]
                chosen.append(candidates[number + best])
                shown.update()
            # Draws by a cumulative sum in float64: multinomial's float32 rounds, and ends at 2^24 points.
            cumulative = torch.cumsum(distances * weights, 0)
            ahead = min(DRAWN_AHEAD, max(1, len(chosen) // FEW), clusters - len(chosen))
            draws = torch.rand(CANDIDATES * ahead, generator=generator, dtype=torch.float64) * cumulative[-1]
            candidates = torch.searchsorted(cumulative, draws, right=True).clamp_(max=len(points) - 1)
    return points[torch.stack(chosen)]


def _assign(points: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [nearest(part, centres) for part in points.split(CHUNK)]
    return torch.cat([index for index, _ in parts]), torch.cat([errors for _, errors in parts])


def _means(points, weights, index, errors, clusters: int) -> torch.Tensor:
    """Weighted mean of each cluster, float32 [clusters, d]; an empty one moves to a badly represented vector."""
    sums = torch.zeros(clusters, points.shape[1], dtype=torch.float64)
    sums.index_add_(0, index, points.double() * weights[:, None])  # sums of integers: exact in any order
    counts = torch.zeros(clusters, dtype=torch.float64).index_add_(0, index, weights.double())
    empty = torch.nonzero(counts == 0).flatten()
    if len(empty):
        worst = torch.argsort(errors.double() * weights, descending=True, stable=True)[: len(empty)]
        sums[empty], counts[empty] = points[worst].double(), 1.0
    return (sums / counts[:, None]).float()


def _settle_apart(centres: torch.Tensor, points: torch.Tensor, weights: torch.Tensor, settle) -> torch.Tensor:
    """Settled centres, all different: one that settles on another's value moves to the worst represented vector."""
    settled = settle(centres)
    while True:
        distinct, first = np.unique(settled.numpy(), axis=0, return_index=True)
        if len(distinct) == len(settled):
            return settled
        repeated = np.setdiff1d(np.arange(len(settled)), first)
        _, errors = _assign(points, settled)
        worst = torch.argsort(errors.double() * weights, descending=True, stable=True)[: len(repeated)]
        settled[torch.from_numpy(repeated)] = points[worst]
