"""Cases of the loss head for any device and implementation: inputs, float64 oracle, errors."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from megat2i.kernels import LiveTokens, linear_cross_entropy, reference

IGNORE = -100
ORDINARY = 8.0  # nats: losses of smaller logits are held to an absolute error, of larger ones to a relative error
RANGES = ((0, 301), (320, 620))  # text and image ids: no multiple of a tile, unused rows between and behind
HALFWAY = ((0, 300), (320, 535))  # of flat logits all but the target's sum to 514, halfway between two bfloat16 numbers
ROWS = 640


@dataclass(frozen=True)
class Case:
    """One call; ``scale`` of the logits: 0 is flat, 12 peaked; ``far``: targets' logits lie this far below others."""

    dtype: torch.dtype = torch.bfloat16
    tokens: int = 150
    width: int = 96
    scale: float = 1.0
    ignored: str = "random"  # none, random, all, tail (whole tiles at the end)
    mode: str = "exact"
    z_loss: float = 0.0
    weighted: bool = False
    uniform: bool = True  # upstream gradient: one number, or one for each token
    confident: bool = False  # p of about 0.999 on the target
    far: float = 0.0
    bucket: int = 0  # capacity of LiveTokens; 0: not given
    ranges: tuple = RANGES


class Errors(NamedTuple):
    """Against float64: largest absolute error of loss, nll, lse and off-range mass, over max(1, largest logit /
    ORDINARY); share of wrong ``correct``; relative 2-norms of the errors of both gradients."""

    fields: float
    correct: float
    hidden: float
    weight: float


def inputs(case: Case, device: str = "cpu"):
    """(hidden [N, D], weight [V, D], targets [N], token_weight [N] or None, upstream [N] or a number)."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.cat([torch.arange(*pair) for pair in case.ranges])
    targets = ids[torch.randint(len(ids), (case.tokens,), generator=generator)]
    hidden = torch.randn(case.tokens, case.width, generator=generator)
    weight = torch.randn(ROWS, case.width, generator=generator) * case.width**-0.5 * case.scale
    if case.confident:  # nearly orthogonal rows, and states along the target's row
        weight = torch.nn.functional.normalize(torch.randn(ROWS, case.width, generator=generator), dim=1) * 4
        hidden = weight[targets] * (14.0 / 16)
    if case.far:
        hidden[:, 0], weight[:, 0] = 1.0, 0.0
        weight[ids[-1], 0] = case.far
        targets[targets == ids[-1]] = ids[0]
    if case.ignored == "random":
        targets[torch.rand(case.tokens, generator=generator) < 0.3] = IGNORE
    elif case.ignored == "tail":
        targets[case.tokens // 3 :] = IGNORE
    elif case.ignored == "all":
        targets[:] = IGNORE
    token_weight = torch.rand(case.tokens, generator=generator) if case.weighted else None
    scaling = 1024.0 if case.dtype == torch.float16 else 1.0  # of the loss: without it gradients are below its numbers
    upstream = 0.37 * scaling if case.uniform else torch.rand(case.tokens, generator=generator) * scaling
    hidden, weight = hidden.to(device, case.dtype), weight.to(device, case.dtype)
    move = [None if t is None else t.to(device) for t in (targets, token_weight)]
    return hidden, weight, *move, upstream if case.uniform else upstream.to(device)


def evaluate(function, hidden, weight, upstream, *arguments, **options):
    """(fields, gradient to hidden, gradient to weight) in float64."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    losses = function(hidden, weight, *arguments, **options)
    (losses.loss.sum() * upstream if isinstance(upstream, float) else (losses.loss * upstream).sum()).backward()
    return [values.detach().double() for values in losses], hidden.grad.double(), weight.grad.double()


def relative(found, expected) -> float:
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def errors(case: Case, implementation: str, device: str = "cpu", **options) -> Errors:
    """Of ``implementation`` on ``device``."""
    hidden, weight, targets, token_weight, upstream = inputs(case, device)
    live = None
    if case.bucket:
        modality = torch.where(targets == IGNORE, -1, (targets >= case.ranges[1][0]).long())
        live = LiveTokens.collect(modality.cpu(), case.bucket)
        live = live and live.to(torch.device(device))
    common = {"ranges": case.ranges, "mode": case.mode, "z_loss": case.z_loss} | options
    found = evaluate(linear_cross_entropy, hidden, weight, upstream, targets, token_weight=token_weight, live=live,
                     implementation=implementation, **common)  # fmt: skip
    wide_upstream = upstream if isinstance(upstream, float) else upstream.double()
    wide_weight = None if token_weight is None else token_weight.double()
    expected = evaluate(reference.linear_cross_entropy, hidden.double(), weight.double(), wide_upstream, targets,
                        token_weight=wide_weight, **common)  # fmt: skip
    ids = torch.cat([torch.arange(*pair, device=device) for pair in case.ranges])
    logits = hidden[targets != IGNORE].double() @ weight[ids].double().T
    size = max(1.0, logits.abs().max().item() / ORDINARY) if len(logits) else 1.0
    fields = [(f - e).abs().max().item() / size for f, e in zip(found[0], expected[0], strict=True)]
    fields = [float("inf") if value != value else value for value in fields]
    wrong = (found[0][3] != expected[0][3]).double().mean().item()
    return Errors(max(*fields[:3], fields[4]), wrong, relative(found[1], expected[1]), relative(found[2], expected[2]))


BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 1e-3}


def check(case: Case, implementation: str, device: str = "cpu") -> Errors:
    """Raise AssertionError where an error is above its bound."""
    found = errors(case, implementation, device)
    bound = BOUNDS[case.dtype]
    assert found.fields < 1e-5, found
    assert found.correct == 0, found
    assert found.hidden < bound and found.weight < bound, found
    return found


def broken_kernels(original: str, replacement: str, folder: Path):
    """The head's module of kernels with a piece of its source replaced; the piece must be there."""
    from megat2i.kernels.linear_cross_entropy import triton_kernels

    source = Path(triton_kernels.__file__).read_text()
    assert original in source, original
    file = folder / "broken_triton_kernels.py"
    file.write_text(source.replace(original, replacement))
    spec = importlib.util.spec_from_file_location("broken_triton_kernels", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
