"""The loss head against its plain twin in float64."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megat2i.kernels import gradient_bound, linear_cross_entropy, reference

MODULE = importlib.import_module("megat2i.kernels.linear_cross_entropy.chunked")
IGNORE = -100
RANGES = ((0, 37), (48, 90))  # with unused rows between them and behind them
ROWS = 96


def make_case(tokens=29, width=16, ranges=RANGES, rows=ROWS, ignored=0.3, scale=1.0, seed=0, dtype=torch.float32):
    """(hidden [N, D], weight [V, D], targets [N]); ``scale`` of the logits: 1 is flat, 12 or more is peaked."""
    generator = torch.Generator().manual_seed(seed)
    live = torch.cat([torch.arange(start, end) for start, end in ranges])
    targets = live[torch.randint(0, len(live), (tokens,), generator=generator)]
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(rows, width, generator=generator) * width**-0.5 * scale
    targets[torch.rand(tokens, generator=generator) < ignored] = IGNORE
    return hidden.to(dtype), weight.to(dtype), targets


def evaluate(function, hidden, weight, targets, upstream, **options):
    """Results in float64, and the gradients of sum(upstream * loss)."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    losses = function(hidden, weight, targets, **options)
    (losses.loss * upstream).sum().backward()
    return [values.detach().double() for values in losses], hidden.grad.double(), weight.grad.double()


def relative_error(found, expected) -> float:
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def compare(hidden, weight, targets, upstream=None, token_weight=None, ranges=RANGES, z_loss=0.0):
    """Largest error of each output field, and relative errors of both gradients, against float64 on the same numbers.

    Absolute errors of losses are divided by the largest log-sum-exp where that is above 1.
    """
    upstream = torch.ones(len(targets)) if upstream is None else upstream
    options = {"ranges": ranges, "z_loss": z_loss}
    found = evaluate(linear_cross_entropy, hidden, weight, targets, upstream, token_weight=token_weight, **options)
    wide_weight = None if token_weight is None else token_weight.double()
    expected = evaluate(
        reference.linear_cross_entropy,
        hidden.double(),
        weight.double(),
        targets,
        upstream.double(),
        token_weight=wide_weight,
        **options,
    )
    size = max(1.0, expected[0][2].abs().max().item()) if len(targets) else 1.0
    fields = [((f - e).abs().max() / size).item() for f, e in zip(found[0], expected[0], strict=True)]
    return fields, relative_error(found[1], expected[1]), relative_error(found[2], expected[2])


@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 12.0])
@pytest.mark.parametrize("z_loss", [0.0, 1e-3])
@pytest.mark.parametrize("weighted", [False, True])
def test_float32_equals_the_reference(ignored, scale, z_loss, weighted):
    hidden, weight, targets = make_case(ignored=ignored, scale=scale)
    token_weight = torch.rand(len(targets)) if weighted else None
    upstream = torch.randn(len(targets), generator=torch.Generator().manual_seed(1))
    fields, hidden_error, weight_error = compare(hidden, weight, targets, upstream, token_weight, z_loss=z_loss)
    assert max(fields[:3]) < 1e-5 and fields[4] < 1e-5
    assert scale == 0.0 or fields[3] == 0.0  # of equal logits any may be called the largest
    assert hidden_error < 1e-5 or scale == 0.0
    assert weight_error < 1e-5


def confident_case(dtype):
    """Every target has a probability of about 0.999: its gradient is a difference of near-equal numbers."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.eye(ROWS) * 11.3
    targets = torch.cat([torch.arange(*pair) for pair in RANGES])[torch.randperm(79, generator=generator)[:32]]
    hidden = torch.eye(ROWS)[targets] + 0.01 * torch.randn(32, ROWS, generator=generator)
    return hidden.to(dtype), weight.to(dtype), targets


def test_confident_predictions_keep_their_gradient():
    hidden, weight, targets = confident_case(torch.float32)
    probability = torch.exp(-linear_cross_entropy(hidden, weight, targets, ranges=RANGES).nll)
    assert probability.min() > 0.9985 and probability.max() < 0.9995
    fields, hidden_error, weight_error = compare(hidden, weight, targets)
    assert max(fields) < 1e-5 and max(hidden_error, weight_error) < 1e-5


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_bfloat16_gradients_stay_near_the_reference(scale):
    hidden, weight, targets = make_case(tokens=200, width=64, scale=scale, dtype=torch.bfloat16)
    fields, hidden_error, weight_error = compare(hidden, weight, targets)
    assert max(hidden_error, weight_error) < 3e-3
    assert max(fields) < 1e-5


def test_bfloat16_gradients_of_confident_predictions():
    hidden, weight, targets = confident_case(torch.bfloat16)
    fields, hidden_error, weight_error = compare(hidden, weight, targets)
    assert max(hidden_error, weight_error) < 3e-3 and max(fields) < 1e-5


@pytest.mark.parametrize("break_it", ["target", "weights", "range", "scale"])
def test_the_comparison_notices_a_wrong_result(break_it):
    hidden, weight, targets = make_case()
    token_weight = torch.rand(len(targets)) + 0.5
    upstream = torch.ones(len(targets))
    good = evaluate(linear_cross_entropy, hidden, weight, targets, upstream, ranges=RANGES, token_weight=token_weight)
    ranges = RANGES
    if break_it == "target":
        targets = targets.roll(1)
    elif break_it == "weights":
        token_weight = token_weight.roll(1)
    elif break_it == "range":
        ranges = ((0, 48), (48, 90))
    else:
        upstream = upstream * 1.001
    bad = evaluate(linear_cross_entropy, hidden, weight, targets, upstream, ranges=ranges, token_weight=token_weight)
    assert relative_error(bad[1], good[1]) > 1e-5 and relative_error(bad[2], good[2]) > 1e-5


@pytest.mark.parametrize("elements", [1, 79 * 3, 79 * 7 + 5, 1 << 23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chunk_size_does_not_matter(monkeypatch, elements, dtype):
    hidden, weight, targets = make_case(tokens=40, dtype=dtype)
    upstream = torch.rand(40)
    expected = evaluate(linear_cross_entropy, hidden, weight, targets, upstream, ranges=RANGES)
    monkeypatch.setattr(MODULE, "CHUNK_ELEMENTS", elements)
    found = evaluate(linear_cross_entropy, hidden, weight, targets, upstream, ranges=RANGES)
    for a, b in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    bound = 1e-6 if dtype == torch.float32 else 4e-3  # one rounding of the result
    assert relative_error(found[1], expected[1]) < bound and relative_error(found[2], expected[2]) < bound


def test_columns_in_gaps_get_no_probability_and_exactly_no_gradient():
    hidden, weight, targets = make_case()
    with torch.no_grad():
        weight[37:48] = 1e4  # would swallow all probability
        weight[90:] = float("nan")
    losses, hidden_grad, weight_grad = evaluate(
        linear_cross_entropy, hidden, weight, targets, torch.ones(len(targets)), ranges=RANGES
    )
    assert (weight_grad[37:48] == 0).all() and (weight_grad[90:] == 0).all()
    assert torch.isfinite(hidden_grad).all() and all(torch.isfinite(values).all() for values in losses)
    assert (weight_grad[:37] != 0).any()


def test_ignored_tokens_with_huge_logits_leave_the_gradients_finite():
    """Padding positions may have any logits: their share of the gradient is 0, not 0 times infinity."""
    hidden, weight, targets = make_case(ignored=0.5)
    hidden[targets == IGNORE] *= 200
    fields, hidden_error, weight_error = compare(hidden, weight, targets)
    assert max(fields) < 1e-5 and hidden_error < 1e-5 and weight_error < 1e-5


@st.composite
def tables(draw) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """(ranges, blocks): one to three ranges with gaps, in a table of one block or of two in either order."""
    ranges, at = [], 0
    for size in draw(st.lists(st.integers(1, 30), min_size=1, max_size=3)):
        gap = draw(st.integers(0, 9))
        ranges.append((at + gap, at + gap + size))
        at += gap + size
    rows = at + draw(st.integers(0, 9))
    cut = draw(st.integers(0, rows))
    blocks = ((0, rows),) if cut in (0, rows) else ((0, cut), (cut, rows))
    return tuple(ranges), blocks[:: draw(st.sampled_from([1, -1]))]


@given(
    tokens=st.integers(1, 40),
    width=st.integers(1, 33),
    table=tables(),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    scale=st.sampled_from([0.0, 1.0, 8.0, 60.0]),
    mode=st.sampled_from(["exact", "certified", "masked"]),
    delta=st.sampled_from([1e-3, 0.3, 1.0]),
    z_loss=st.sampled_from([0.0, 1e-4, 1e-2]),
    weighted=st.booleans(),
    chunk=st.sampled_from([1, 200, 1 << 24]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_any_call(tokens, width, table, ignored, scale, mode, delta, z_loss, weighted, chunk, seed):
    ranges, blocks = table
    rows = max(end for _, end in blocks)
    hidden, weight, targets = make_case(tokens, width, ranges, rows, ignored, scale, seed)
    generator = torch.Generator().manual_seed(seed)
    # mode "certified" bounds its gradients for an upstream gradient of 1
    upstream = torch.ones(tokens) if mode == "certified" else torch.randn(tokens, generator=generator)
    token_weight = torch.rand(tokens, generator=generator) if weighted else None
    options = {"ranges": ranges, "mode": mode, "z_loss": z_loss}
    wide = evaluate(reference.linear_cross_entropy, hidden.double(), weight.double(), targets, upstream.double(),
                    token_weight=token_weight.double() if weighted else None, **options)  # fmt: skip
    place = torch.cat([torch.arange(*block) for block in blocks])  # of every row of this call's table
    options |= {"token_weight": token_weight, "blocks": blocks, "delta": delta}
    before, MODULE.CHUNK_ELEMENTS = MODULE.CHUNK_ELEMENTS, chunk
    try:
        found = evaluate(linear_cross_entropy, hidden, weight[place], targets, upstream, **options)
        losses = linear_cross_entropy(hidden, weight[place], targets, **options)
    finally:
        MODULE.CHUNK_ELEMENTS = before
    largest = (hidden.double() @ weight.double().T).abs().max().item()
    unit = 1.25e-6 * max(8.0, largest)  # the error of a loss, hence relative of a probability
    for one, other in zip(found[0][:3], wide[0], strict=False):
        assert (one - other).abs().max() < unit * (1 + 2 * z_loss * largest)
    assert (found[0][4] - wide[0][4]).abs().max() < 10 * unit
    live = (targets != IGNORE).sum().sqrt() * upstream.abs().max() * (1 + 2 * z_loss * (largest + 5))
    skipped = gradient_bound(losses, hidden, weight) if mode == "certified" else None
    for error, size, allowed in (
        ((found[1] - wide[1]).norm(dim=1), weight.norm(dim=1).max(), skipped and skipped.hidden.double()),
        ((found[2] - wide[2][place]).norm(dim=1).sum()[None], hidden.norm(dim=1).max() * rows**0.5,
         skipped and skipped.weight.double()),
    ):  # fmt: skip
        assert (error <= 4 * unit * live * size + (0.0 if skipped is None else allowed)).all()


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_gradcheck_in_float64(z_loss, monkeypatch):
    monkeypatch.setattr(MODULE, "CHUNK_ELEMENTS", 9 * 2)
    ranges = ((0, 4), (6, 11))
    hidden, weight, targets = make_case(5, 3, ranges, 12, ignored=0.2, dtype=torch.float64)
    token_weight = torch.rand(5, dtype=torch.float64)

    def loss(hidden, weight):
        return linear_cross_entropy(
            hidden, weight, targets, ranges=ranges, z_loss=z_loss, token_weight=token_weight
        ).loss

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), weight.requires_grad_()))


def test_fields_by_hand():
    weight = torch.eye(6)
    hidden = torch.log(torch.tensor([[1.0, 2.0, 9.0, 3.0, 4.0, 9.0]])).repeat(3, 1)
    losses = linear_cross_entropy(
        hidden,
        weight,
        torch.tensor([1, 4, IGNORE]),
        ranges=((0, 2), (3, 5)),
        z_loss=0.5,
        token_weight=torch.tensor([2.0, 3.0, 5.0]),
    )
    lse = torch.tensor(10.0).log()
    nll = -torch.log(torch.tensor([0.2, 0.4]))
    torch.testing.assert_close(losses.nll, torch.tensor([*nll, 0.0]))
    torch.testing.assert_close(losses.lse, torch.tensor([lse, lse, 0.0]))
    torch.testing.assert_close(losses.off_range_mass, torch.tensor([0.7, 0.3, 0.0]))
    assert losses.correct.tolist() == [0.0, 1.0, 0.0]
    expected = torch.tensor([2.0, 3.0]) * (nll + 0.5 * lse**2)
    torch.testing.assert_close(losses.loss, torch.tensor([*expected, 0.0]))


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize("outside", [37, 47, 90, 95, 5000, -1])
def test_a_target_outside_the_ranges_is_nan_for_its_token_alone(implementation, outside):
    hidden, weight, targets = make_case(ignored=0.0)
    good = linear_cross_entropy(hidden, weight, targets, ranges=RANGES, implementation=implementation)
    targets[3] = outside
    bad = linear_cross_entropy(hidden, weight, targets, ranges=RANGES, implementation=implementation)
    assert bad.loss[3].isnan() and bad.nll[3].isnan()
    others = torch.arange(len(targets)) != 3
    assert torch.equal(bad.loss[others], good.loss[others])


HIDDEN, WEIGHT, TARGETS = make_case()


@pytest.mark.parametrize(
    "changed",
    [
        {"hidden": HIDDEN[None]},
        {"hidden": HIDDEN[:, :-1]},
        {"targets": TARGETS[:-1]},
        {"targets": TARGETS[None]},
        {"token_weight": torch.ones(len(TARGETS) - 1)},
        {"ranges": ()},
        {"ranges": ((10, 5),)},
        {"ranges": ((0, 20), (10, 30))},
        {"ranges": ((20, 30), (0, 10))},
        {"ranges": ((-1, 5),)},
        {"ranges": ((0, ROWS + 1),)},
        {"ranges": ((3, 3),)},
        {"mode": "sampled"},
        {"blocks": ((0, 48), (48, 95))},
        {"implementation": "quick"},
    ],
    ids=str,
)
def test_wrong_arguments(changed):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, "ranges": RANGES} | changed
    with pytest.raises(ValueError):
        linear_cross_entropy(**arguments)


def test_no_tokens():
    hidden, weight, targets = make_case(tokens=0)
    losses, hidden_grad, weight_grad = evaluate(
        linear_cross_entropy, hidden, weight, targets, torch.ones(0), ranges=RANGES
    )
    assert all(values.shape == (0,) for values in losses)
    assert hidden_grad.shape == (0, 16) and (weight_grad == 0).all()
