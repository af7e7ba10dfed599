"""What only a GPU can show of the kernels: real sizes against float64, graph capture, no waiting, races, stray writes.

``make test-gpu`` runs this file and ``tests/test_model_on_gpu.py``; it needs torch, triton and pytest. The small cases
are those of the interpreted tests; ``-k small`` leaves the few that `make sanitize-gpu` can afford.
"""

import importlib

import pytest
import torch

pytest.importorskip("triton")
from block_cases import CASES as BLOCK_CASES
from block_cases import MORE as MORE_BLOCK_CASES
from block_cases import Case as BlockCase
from block_cases import arguments, norm, rope
from block_cases import check as check_block
from guarded import guarded
from head_cases import IGNORE, Case, check, relative
from test_decode_attention import BOUNDS as DECODE_BOUNDS
from test_decode_attention import CASES as DECODE_CASES
from test_decode_attention import error as decode_error
from test_triton_head import CASES as HEAD_CASES
from test_triton_head import MORE as MORE_HEAD_CASES
from test_triton_head import certified

from megat2i.kernels import LiveTokens, choose_ops, linear_cross_entropy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
RANGES, ROWS, WIDTH = ((0, 50_284), (50_432, 66_816)), 66_816, 2_048
BF16 = torch.bfloat16


@pytest.mark.parametrize("implementation", ["triton", "chunked"])
@pytest.mark.parametrize("case", [*HEAD_CASES.values(), *MORE_HEAD_CASES.values()], ids=str)
def test_head_cases(case, implementation):
    check(case, implementation, "cuda")


@pytest.mark.parametrize("case", [*BLOCK_CASES.values(), *MORE_BLOCK_CASES.values()], ids=str)
def test_block_cases(case):
    check_block(case, "cuda")


REAL_BLOCKS = {
    "norm": norm("add_layer_norm", (8_191, 2_048), True, BF16),
    "rope": rope(7, 1_151, 16, 64, 2_048, dtype=BF16),
    "swiglu": BlockCase("swiglu", "swiglu", ((8_191, 5_632), (8_191, 5_632)), dtype=BF16, strided=True),
}


@pytest.mark.parametrize("op", REAL_BLOCKS)
def test_block_kernels_at_the_papers_shape(op):
    with guarded():
        check_block(REAL_BLOCKS[op], "cuda")


@pytest.mark.parametrize("op", REAL_BLOCKS)
def test_block_kernels_repeat_bit_for_bit_and_in_a_graph(op):
    case = REAL_BLOCKS[op]
    function = getattr(importlib.import_module(f"megat2i.kernels.{case.module}"), case.op)
    positional, options, taking = arguments(case, "cuda")

    def step():
        results = function(*positional, **options)
        results = results if isinstance(results, tuple) else (results,)
        upstream = [torch.ones_like(result) for result in results]
        return [*results, *torch.autograd.grad(results, taking, upstream)]

    first, graph = on_a_side_stream(step), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(20):  # a race shows as a result that moves
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(first, captured, strict=True))


def on_a_side_stream(step):
    """The result of the second of two calls, made as a capture wants to be prepared."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        result = step()
    torch.cuda.current_stream().wait_stream(stream)
    return result


@pytest.mark.parametrize("dtype", DECODE_BOUNDS)
@pytest.mark.parametrize("name", DECODE_CASES)
def test_decode_attention_small(name, dtype):
    with guarded():
        assert decode_error(name, dtype, "cuda") < DECODE_BOUNDS[dtype]


def test_the_small_head_between_guards():
    for mode in ("exact", "certified", "masked"):
        with guarded():
            check(Case(tokens=257, mode=mode, confident=mode == "certified", z_loss=1e-3, bucket=256), "triton", "cuda")


def test_small_blocks_between_guards():
    for case in BLOCK_CASES.values():
        with guarded():
            check_block(case, "cuda")


def real(tokens: int, scale: float, ignored: float = 1 / 12):
    """(hidden, weight, targets) of the paper's head in bfloat16; larger scales are more peaked."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    options = {"generator": generator, "device": "cuda"}
    image = torch.rand(tokens, **options) > 0.03
    targets = torch.where(
        image, torch.randint(*RANGES[1], (tokens,), **options), torch.randint(*RANGES[0], (tokens,), **options)
    )
    weight = torch.randn(ROWS, WIDTH, **options) * WIDTH**-0.5
    hidden = torch.randn(tokens, WIDTH, **options) * scale + scale * 3 * torch.nn.functional.normalize(weight[targets])
    targets[torch.rand(tokens, **options) < ignored] = IGNORE
    return hidden.to(BF16), weight.to(BF16), targets


def oracle(hidden, weight, targets):
    """(nll [N], gradients of the sum) in float64, a thousand tokens at a time."""
    hidden, weight = hidden.double(), weight.double()
    columns = torch.cat([torch.arange(*pair, device="cuda") for pair in RANGES])
    nll, grad_hidden = torch.zeros(len(hidden), device="cuda", dtype=torch.float64), torch.zeros_like(hidden)
    grad_weight = torch.zeros_like(weight)
    outside = torch.ones(ROWS, dtype=torch.bool, device="cuda")
    outside[columns] = False
    for rows in (targets != IGNORE).nonzero()[:, 0].split(1_024):
        logits = (hidden[rows] @ weight.T).masked_fill_(outside, float("-inf"))
        target = targets[rows, None]
        lse = logits.logsumexp(1, keepdim=True)
        nll[rows] = (lse - logits.gather(1, target))[:, 0]
        gradient = logits.sub_(lse).exp_()
        gradient.scatter_add_(1, target, torch.full_like(target, -1, dtype=torch.float64))
        grad_hidden[rows] = gradient @ weight
        grad_weight += gradient.T @ hidden[rows]
    return nll, grad_hidden, grad_weight


def run(hidden, weight, targets, **options):
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    losses = linear_cross_entropy(hidden, weight, targets, ranges=RANGES, implementation="triton", **options)
    losses.loss.sum().backward()
    return losses, hidden.grad, weight.grad


@pytest.mark.parametrize("tokens", [8_192, 36_864])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 8.0], ids=["flat", "ordinary", "peaked"])
def test_the_head_at_real_sizes(tokens, scale):
    hidden, weight, targets = real(tokens, scale)
    with guarded():
        losses, grad_hidden, grad_weight = run(hidden, weight, targets)
    nll, of_hidden, of_weight = oracle(hidden, weight, targets)
    assert (losses.nll.double() - nll).abs().max() < 1e-5 * max(1.0, losses.lse.abs().max().item())
    assert relative(grad_hidden.double(), of_hidden) < 3e-3
    assert relative(grad_weight.double(), of_weight) < 3e-3


@pytest.mark.parametrize("mode", ["exact", "certified", "masked"])
def test_runs_repeat_bit_for_bit(mode):
    hidden, weight, targets = real(8_192, 8.0)
    first = run(hidden, weight, targets, mode=mode)
    for _ in range(8):  # a race shows as a result that moves
        again = run(hidden, weight, targets, mode=mode)
        assert torch.equal(first[0].loss, again[0].loss)
        assert torch.equal(first[1], again[1]) and torch.equal(first[2], again[2])


def test_the_bucket_changes_nothing_but_rounding():
    hidden, weight, targets = real(8_192, 1.0)
    first = run(hidden, weight, targets)
    modality = torch.where(targets == IGNORE, -1, (targets >= RANGES[1][0]).long()).cpu()
    live = LiveTokens.collect(modality, 7_680).to(torch.device("cuda"))
    packed = run(hidden, weight, targets, live=live)
    assert relative(packed[1].double(), first[1].double()) < 3e-3
    assert relative(packed[2].double(), first[2].double()) < 3e-3


@pytest.mark.parametrize("mode", ["exact", "certified"])
def test_nothing_waits_for_the_device_and_a_graph_replays_it(mode):
    hidden, weight, targets = real(8_192, 1.0)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    result = {}

    def step():
        losses = linear_cross_entropy(hidden, weight, targets, ranges=RANGES, mode=mode, z_loss=1e-4)
        result["loss"] = losses.loss.sum()
        result["gradients"] = torch.autograd.grad(result["loss"], (hidden, weight))

    on_a_side_stream(step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    captured = result["loss"], *result["gradients"]
    with torch.no_grad():
        hidden.mul_(0.5)
    graph.replay()
    replayed = [tensor.clone() for tensor in captured]
    step()
    for one, other in zip(replayed, (result["loss"], *result["gradients"]), strict=True):
        assert torch.equal(one, other)


def test_the_head_needs_little_memory():
    hidden, weight, targets = real(36_864, 1.0)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, targets, ranges=RANGES).loss.sum().backward()
    kept = hidden.grad.nbytes + 4 * weight.numel()
    extra = torch.cuda.max_memory_allocated() - before - kept
    print(f"\npeak beyond inputs, gradient to hidden and float32 gradient to weight: {extra / 1e9:.2f} GB")
    assert extra < 0.6e9  # a buffer of exponentials; all logits are 4.9 GB


@pytest.mark.parametrize("adversarial", [False, True])
def test_the_certified_bound_holds(adversarial):
    hidden, weight, share, same_loss = certified(5.0, torch.float32, 1e-3, "triton", adversarial, "cuda")
    assert same_loss and share > 0.3 and hidden <= 1.0 and weight <= 1.0


@pytest.mark.parametrize("packed", [False, True])
def test_attention(packed):
    from megat2i.kernels import reference
    from megat2i.kernels.attention import document_mask

    ops = choose_ops(torch.device("cuda"), BF16)
    generator = torch.Generator(device="cuda").manual_seed(0)
    q, k, v = (torch.randn(2, 4, 256, 128, generator=generator, device="cuda", dtype=BF16) for _ in range(3))
    mask = document_mask(torch.arange(256, device="cuda").expand(2, 256) // 100) if packed else None
    found = []
    for call, kind in ((ops.attention, BF16), (reference.attention, torch.float64)):
        inputs = [t.to(kind).requires_grad_() for t in (q, k, v)]
        result = call(*inputs, mask)
        found.append([t.double() for t in (result, *torch.autograd.grad(result.sum(), inputs))])
    for one, other in zip(*found, strict=True):
        assert relative(one, other) < 1e-2
