"""Every op as PyTorch sees it: opcheck, and torch.compile of a function that uses it, in one graph."""

import subprocess
import sys

import pytest
import torch
from head_cases import RANGES, Case, inputs

from megat2i.kernels import linear_cross_entropy
from megat2i.kernels.linear_cross_entropy.op import linear_cross_entropy_op


@pytest.mark.parametrize("mode", ["exact", "certified"])
def test_the_head_is_a_sound_custom_op(mode):
    hidden, weight, targets, token_weight, _ = inputs(Case(torch.float32, tokens=20, width=16, weighted=True))
    flat, blocks = [bound for pair in RANGES for bound in pair], [0, len(weight)]
    tensors = (hidden.requires_grad_(), weight.requires_grad_(), targets, token_weight, None)
    torch.library.opcheck(
        linear_cross_entropy_op, (*tensors, flat, blocks, mode, 1e-3, -100, 1e-4, "", "chunked", True, True)
    )


def test_the_head_compiles_into_one_graph():
    def step(hidden, weight, targets):
        losses = linear_cross_entropy(hidden * 2, weight, targets, ranges=RANGES, z_loss=1e-4)
        return losses.loss.sum() / 7, losses.nll

    hidden, weight, targets, _, _ = inputs(Case(torch.float32, tokens=20, width=16))
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss, nll = function(x, w, targets)
        loss.backward()
        results.append((loss.detach(), nll, x.grad, w.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_a_call_without_compiling_does_not_load_the_compiler():
    code = (
        "import sys, torch\n"
        "from megat2i.kernels import linear_cross_entropy\n"
        "x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)\n"
        "linear_cross_entropy(x, w, torch.tensor([0, 1, 2]), ranges=((0, 5),)).loss.sum().backward()\n"
        "assert x.grad is not None and 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
