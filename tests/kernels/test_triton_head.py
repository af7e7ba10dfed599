"""The loss head's Triton form, interpreted, against float64; and the chunked form in the same cases."""

import itertools
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from block_cases import CASES as BLOCK_CASES
from head_cases import HALFWAY, IGNORE, RANGES, Case, broken_kernels, check, errors, evaluate, inputs
from interpreted import interpreter

from megat2i.kernels import LiveTokens, gradient_bound, linear_cross_entropy

BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16
# Every pair of values of dtype, ignored tokens, mode, peakedness, z-loss, weights, upstream gradient and bucket.
FLAT = {"scale": 0.0, "ranges": HALFWAY}
CASES = {
    "flat": Case(**FLAT, tokens=257, ignored="none", z_loss=1e-3, weighted=True, bucket=257),
    "confident masked": Case(confident=True, width=300, mode="masked", z_loss=1e-3, weighted=True, uniform=False,
                             bucket=128),
    "beyond the window": Case(scale=12.0, far=31.0, ignored="tail", mode="certified", z_loss=1e-4, uniform=False),
    "flat, no targets": Case(**FLAT, ignored="all", uniform=False, bucket=128),
    "one token masked float32": Case(F32, scale=12.0, tokens=1, ignored="none", mode="masked", weighted=True,
                                  uniform=False),
    "flat certified float32": Case(F32, **FLAT, mode="certified", weighted=True),
    "confident float32": Case(F32, confident=True, tokens=129, ignored="tail"),
    "no targets masked float32": Case(F32, scale=12.0, ignored="all", mode="masked", z_loss=1e-3, bucket=150),
    "confident certified float16": Case(F16, confident=True, tokens=128, ignored="none", mode="certified", bucket=128),
    "peaked float16": Case(F16, scale=12.0, z_loss=1e-4, uniform=False, bucket=150),
    "flat masked float16": Case(F16, **FLAT, tokens=129, ignored="tail", mode="masked", z_loss=1e-3, weighted=True,
                                bucket=100),
    "no targets certified float16": Case(F16, confident=True, ignored="all", mode="certified", weighted=True,
                                         uniform=False),
}  # fmt: skip
MORE = {
    "almost flat": Case(scale=0.001, ranges=HALFWAY, tokens=300, ignored="none"),
    "whole tiles": Case(tokens=128, width=64, ignored="none", weighted=True, bucket=128),
    "bucket too small": Case(bucket=100, z_loss=0.1),
    "just inside the window": Case(F32, far=29.0, tokens=40),
    "beyond the window": Case(far=31.0, tokens=140),
    "beyond float32": Case(far=120.0, tokens=40),
}
INTERPRETED = 20  # cases against float64 that `make test` interprets: these and the block's


@pytest.fixture(scope="module")
def interpret():
    with interpreter() as call:
        yield call


@pytest.mark.parametrize("name", CASES)
def test_triton_equals_float64(interpret, name):
    interpret(check, CASES[name], "triton")


@pytest.mark.full
@pytest.mark.parametrize("name", MORE)
def test_triton_equals_float64_in_more_cases(interpret, name):
    interpret(check, MORE[name], "triton")


@pytest.mark.parametrize("case", [*CASES.values(), *MORE.values()], ids=[*CASES, *(f"{name}, more" for name in MORE)])
def test_chunked_equals_float64(case):
    check(case, "chunked")


def values_of(case: Case) -> tuple:
    """What the cases combine in pairs."""
    kind = "confident" if case.confident else "peaked" if case.scale else "flat"
    return (case.dtype, case.ignored, case.mode, kind, case.z_loss > 0, case.weighted, case.uniform, case.bucket > 0)


def uncovered(cases: list[Case]) -> list[tuple]:
    """Pairs of values that no case has."""
    rows = [values_of(case) for case in cases]
    levels = [set(column) for column in zip(*map(values_of, CASES.values()), strict=True)]
    pairs = itertools.combinations(range(len(levels)), 2)
    wanted = {(a, x, b, y) for a, b in pairs for x in levels[a] for y in levels[b]}
    return sorted(
        wanted - {(a, row[a], b, row[b]) for row in rows for a, b in itertools.combinations(range(8), 2)}, key=str
    )


def test_few_cases_cover_all_pairs():
    assert uncovered(list(CASES.values())) == []
    assert uncovered(list(CASES.values())[1:]) != []
    assert {case.mode for case in CASES.values()} == {"exact", "certified", "masked"}
    assert len(CASES) + len(BLOCK_CASES) <= INTERPRETED


@pytest.mark.full
@pytest.mark.parametrize(
    ("dtype", "ignored", "mode", "scale"),
    list(itertools.product((BF16, F32), ("none", "random", "all", "tail"), ("exact", "masked"), (0.0, 0.3, 4.0))),
)
def test_triton_equals_float64_in_every_combination(interpret, dtype, ignored, mode, scale):
    case = Case(dtype, ignored=ignored, mode=mode, scale=scale, z_loss=1e-3, weighted=True, bucket=150)
    interpret(check, case, "triton")


def rounded_twice(implementation):
    """The errors of flat logits where the rounding of the target's entry stays in the gradients."""
    from megat2i.kernels.linear_cross_entropy.chunked import ChunkedHead
    from megat2i.kernels.linear_cross_entropy.triton_head import TritonHead, scaled

    head = {"triton": TritonHead, "chunked": ChunkedHead}[implementation]
    differentiate = head.differentiate

    def careless(self, values):
        differentiate(self, values)
        if implementation == "triton":
            self.factor = scaled(values, self.offset)[0]
        else:
            self.lost = None

    head.differentiate = careless
    try:
        return errors(MORE["almost flat"], implementation)
    finally:
        head.differentiate = differentiate


def test_rounding_that_all_targets_share_is_noticed(interpret):
    found = interpret(rounded_twice, "triton")
    assert found.hidden > 3e-3 and found.weight > 3e-3


def ignored_everywhere(implementation):
    """The gradients where no token has a target."""
    hidden, weight, targets, _, _ = inputs(Case(ignored="all"))
    return evaluate(linear_cross_entropy, hidden, weight, 1.0, targets, ranges=RANGES, implementation=implementation)


def test_no_target_no_gradient(interpret):
    for fields, hidden, weight in (interpret(ignored_everywhere, "triton"), ignored_everywhere("chunked")):
        assert all((values == 0).all() for values in (*fields, hidden, weight))


def repeat(case):
    """Whether two runs are equal bit for bit, and whether another size of chunk changes anything beyond rounding."""
    from megat2i.kernels.linear_cross_entropy import triton_head

    hidden, weight, targets, _, upstream = inputs(case)
    options = {"ranges": RANGES, "implementation": "triton"}
    first, second = (evaluate(linear_cross_entropy, hidden, weight, upstream, targets, **options) for _ in range(2))
    triton_head.CHUNK_ROWS = 128
    chunked = evaluate(linear_cross_entropy, hidden, weight, upstream, targets, **options)
    triton_head.CHUNK_ROWS = 4096
    same = all(torch.equal(a, b) for a, b in zip([*first[0], *first[1:]], [*second[0], *second[1:]], strict=True))
    return same, ((chunked[2] - first[2]).norm() / first[2].norm()).item(), (chunked[1] - first[1]).abs().max().item()


def test_runs_repeat_and_chunks_do_not_matter(interpret):
    same, of_weight, of_hidden = interpret(repeat, Case(F32, tokens=300))
    assert same and of_weight < 1e-6 and of_hidden < 1e-6


BREAKS = {
    "mask off by one": ("column < columns)[:, None] & (at < width)", "column < columns - 1)[:, None] & (at < width)"),
    "last column lost": ("last = tl.where(own == DEAD, 0, columns)", "last = tl.where(own == DEAD, 0, columns - 1)"),
    "tile dropped": ("for tile in range(first, last):", "for tile in range(first, last - 1):"),
    "target counted twice": ("& (column[None, :] != own[:, None])", "& (column[None, :] >= 0)"),
    "no float32 sums": (
        "total = tl.dot(a, b, total, input_precision=\"ieee\")",
        "total = tl.dot(a, b, total, input_precision=\"ieee\").to(tl.bfloat16).to(tl.float32)",
    ),
    "no second launch": ("power = tl.exp2(", "power = tl.exp2(tl.where(REDO, 0.0, 1.0) * "),
}  # fmt: skip


def broken(original, replacement, case):
    """The errors with a broken kernel."""
    from megat2i.kernels.linear_cross_entropy import triton_head

    working = triton_head.kernels
    with tempfile.TemporaryDirectory() as folder:
        triton_head.kernels = broken_kernels(original, replacement, Path(folder))
        try:
            return errors(case, "triton")
        finally:
            triton_head.kernels = working


@pytest.mark.parametrize("name", BREAKS)
def test_the_comparison_notices_a_broken_kernel(interpret, name):
    case = Case(scale=2.0, tokens=129, mode="certified" if name == "mask off by one" else "exact")
    if name == "no second launch":
        case = replace(case, far=31.0)
    found = interpret(broken, *BREAKS[name], case)
    worst = (found.fields / 1e-5, found.hidden / 3e-3, found.weight / 3e-3)
    assert not max(worst) < 1.0, found  # NaN is noticed too


def separated(leak: float, dtype, device="cpu"):
    """Tokens in runs of one modality whose logits of the other lie ``2 * leak`` lower."""
    hidden, weight, targets, _, _ = inputs(Case(dtype, tokens=400, ignored="none"))
    targets[:] = torch.arange(400) % 300 + RANGES[1][0]
    targets[200:290] -= RANGES[1][0]
    targets[::9] = IGNORE
    hidden[:, 0] = torch.where(targets >= RANGES[1][0], leak, -leak)
    weight[: RANGES[0][1], 0], weight[RANGES[1][0] :, 0] = -1.0, 1.0
    return hidden.to(device), weight.to(device), targets.to(device)


def certified(leak, dtype, delta, implementation, adversarial=False, device="cpu"):
    """(largest dhidden difference over bound, dweight difference over bound, share of tokens skipped, loss equal)."""
    hidden, weight, targets = separated(leak, dtype, device)
    if adversarial:  # states and rows that all point the same way: nothing cancels
        weight[:] = weight.abs()
        weight[:, 0] = torch.where(torch.arange(len(weight), device=device) < RANGES[0][1], -1.0, 1.0)
        hidden[:, 1:] = hidden[:, 1:].abs() * 0.1
    options = {"ranges": RANGES, "z_loss": 1e-3, "implementation": implementation}
    exact = evaluate(linear_cross_entropy, hidden, weight, 1.0, targets, **options)
    losses = linear_cross_entropy(hidden, weight, targets, mode="certified", delta=delta, **options)
    skipping = evaluate(linear_cross_entropy, hidden, weight, 1.0, targets, mode="certified", delta=delta, **options)
    bound = gradient_bound(losses, hidden, weight)
    of_hidden = (exact[1] - skipping[1]).norm(dim=1)
    of_weight = (exact[2] - skipping[2]).norm(dim=1).sum()
    scale = (exact[1].norm(), exact[2].norm() * len(weight) ** 0.5)
    rounding = 1e-6 if dtype == F32 else 4e-3
    room = (bound.hidden.double() + rounding * scale[0], bound.weight.double() + rounding * scale[1])
    share = (losses.skipped > 0).float().mean().item()
    return (
        (of_hidden / room[0]).max().item(),
        (of_weight / room[1]).item(),
        share,
        torch.equal(exact[0][0], skipping[0][0]),
    )


@pytest.mark.parametrize("adversarial", [False, True])
def test_the_certified_bound_holds(interpret, adversarial):
    for call, implementation in ((interpret, "triton"), (lambda f, *a: f(*a), "chunked")):
        hidden, weight, share, same_loss = call(certified, 5.0, F32, 1e-3, implementation, adversarial)
        assert same_loss and 0.3 < share < 0.9, share  # mixed tiles are computed whole
        assert hidden <= 1.0 and weight <= 1.0
        assert not adversarial or weight > 0.2  # the bound is near what it bounds


def test_rows_above_delta_are_computed(interpret):
    for call, implementation in ((interpret, "triton"), (lambda f, *a: f(*a), "chunked")):
        hidden, weight, share, _ = call(certified, 0.5, F32, 1e-3, implementation)
        assert share == 0 and hidden <= 1.0 and weight <= 1.0


def understated(leak):
    """The quotients of difference and bound where the bound is made a hundred times too small."""
    hidden, weight, targets = separated(leak, F32)
    options = {"ranges": RANGES, "implementation": "chunked"}
    exact = evaluate(linear_cross_entropy, hidden, weight, 1.0, targets, **options)
    losses = linear_cross_entropy(hidden, weight, targets, mode="certified", **options)
    skipping = evaluate(linear_cross_entropy, hidden, weight, 1.0, targets, mode="certified", **options)
    bound = gradient_bound(losses._replace(skipped=losses.skipped / 100), hidden, weight)
    return ((exact[2] - skipping[2]).norm(dim=1).sum() / bound.weight).item()


def test_a_bound_that_is_too_small_is_noticed():
    assert understated(5.0) > 1.0


def test_the_bucket_lists_live_tokens_by_modality():
    modality = torch.tensor([[1, -1, 0], [2, 1, -1]])
    live = LiveTokens.collect(modality, 6)
    assert live.count == 4 and live.order.tolist() == [2, 0, 4, 3, -1, -1]
    assert LiveTokens.collect(modality, 3) is None
