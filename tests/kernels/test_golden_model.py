"""The golden runs of the real open_lm with every implementation of every op forced."""

from functools import partial
from pathlib import Path

import pytest
import torch
from interpreted import interpreter

from megat2i.kernels import choose_ops
from megat2i.model import open_lm

CASES = ("a_ln_headrotary_swiglu", "c_gainlp_qknorm_rotary_swiglutorch")


def deviations(path: Path, implementation: str, change: dict) -> tuple[float, float, float]:
    """(largest error of a logit, error of the loss, largest relative error of a gradient) of a golden case."""
    golden = torch.load(path, weights_only=True)
    before = open_lm.choose_ops
    open_lm.choose_ops = partial(choose_ops, implementation=implementation)
    try:
        model = open_lm.load(path, golden["params"] | change)
    finally:
        open_lm.choose_ops = before
    with torch.no_grad():
        logits = (model.logits(golden["input_ids"]) - golden["logits"]).abs().max().item()
    loss = model.loss(golden["input_ids"], golden["targets"])
    loss.backward()
    gradients = [
        ((parameter.grad - golden["grads"][name]).norm() / golden["grads"][name].norm()).item()
        for name, parameter in model.named_parameters()
    ]
    return logits, abs(loss.item() - golden["ce_loss"].item()), max(gradients)


@pytest.fixture(scope="module")
def call():
    """Function of (implementation, function, *arguments) that runs Triton's in the interpreting process."""
    with interpreter() as interpret:
        yield (
            lambda implementation, function, *rest: (
                interpret(function, *rest) if implementation == "triton" else function(*rest)
            )
        )


RUNS = [(name, implementation) for name in CASES for implementation in ("reference", "chunked", "triton")]
# interpreting a whole model takes half a minute: one of the two, that with more kinds of op, is in `make test`
RUNS[2] = pytest.param(*RUNS[2], marks=pytest.mark.full)


@pytest.mark.parametrize(("name", "implementation"), RUNS)
def test_every_implementation_reproduces_open_lm(call, golden, name, implementation):
    path = golden / "open_lm" / f"{name}.pt"
    logits, loss, gradient = call(implementation, deviations, path, implementation, {})
    assert logits < 5e-5 and loss < 1e-5 and gradient < 1e-4


def test_another_eps_is_noticed(call, golden):
    path = golden / "open_lm" / f"{CASES[0]}.pt"
    logits, _, gradient = call("chunked", deviations, path, "chunked", {"norm_eps": 1e-2})
    assert logits > 1e-2 and gradient > 1e-2
