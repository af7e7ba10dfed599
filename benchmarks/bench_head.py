"""The loss head, forward and backward, beside its rivals on the same tensors in the same run.

    python benchmarks/bench_head.py [--json FILE] [--rounds R] [--tokens N ...] [--width D]

Ours in every mode against G, the three bare matrix products (logits, both gradients) that no exact head can do
without; PyTorch on full logits, eager and compiled; ``F.linear_cross_entropy`` where this PyTorch has it; and what is
installed of Liger (its default chunk and ``chunk_mem_const=16``), Apple's cut-cross-entropy (exact and filtered) and
QuACK. Rivals see one vocabulary of all rows and a mean; ours reports per token and modality. 97 % of the targets are
image codes, a twelfth of the tokens has no target. "flat" are random states; "trained" ones know target and modality.
"""

import argparse
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from harness import report, save, take_turns
from torch import Tensor
from torch.nn import functional as F

from megat2i.kernels import LiveTokens, linear_cross_entropy

IGNORE = -100


def main() -> None:
    """Run every size and kind of logits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--tokens", type=int, nargs="*", default=[8_192, 36_864] if cuda else [2_048])
    parser.add_argument("--width", type=int, default=2_048 if cuda else 256)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), nargs="*", default=["bfloat16"])
    parser.add_argument("--rounds", type=int, default=30 if cuda else 5)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    ranges = ((0, 50_284), (50_432, 66_816)) if cuda else ((0, 12_000), (12_032, 16_128))
    sections = {}
    for name in arguments.dtype:
        for tokens in arguments.tokens:
            for kind in ("flat", "trained"):
                tensors = make(tokens, arguments.width, ranges, kind, device, getattr(torch, name))
                results = take_turns(contestants(*tensors, ranges), arguments.rounds, device)
                work = 6 * tokens * arguments.width * ranges[-1][1]
                base = "three matrix products (G)" if cuda else "F.cross_entropy, full logits"
                title = f"{name}, N = {tokens:,}, D = {arguments.width:,}, V = {ranges[-1][1]:,}, {kind} logits"
                report(title, results, base, lambda row, work=work: f"{work / row['ms'] / 1e9:9.1f} TFLOP/s")
                sections[title] = results
    save(arguments.json, device, sections)


def make(tokens: int, width: int, ranges, kind: str, device: torch.device, dtype: torch.dtype):
    """(hidden [N, D], weight [V, D], targets [N], LiveTokens)."""
    generator = torch.Generator().manual_seed(0)
    rows = ranges[-1][1]
    image = torch.rand(tokens, generator=generator).sort().values > 0.03  # runs of one modality
    (text_start, text_end), (image_start, image_end) = ranges
    targets = torch.where(
        image,
        torch.randint(image_start, image_end, (tokens,), generator=generator),
        torch.randint(text_start, text_end, (tokens,), generator=generator),
    )
    weight = torch.randn(rows, width, generator=generator) * width**-0.5
    hidden = torch.randn(tokens, width, generator=generator)
    if kind == "trained":
        hidden += 6 * F.normalize(weight[targets], dim=1)
        weight[:, 0] = torch.where(torch.arange(rows) < image_start, -1.0, 1.0)
        hidden[:, 0] = torch.where(image, 6.0, -6.0)
    targets[torch.rand(tokens, generator=generator) < 1 / 12] = IGNORE
    modality = torch.where(targets == IGNORE, -1, image.long())
    live = LiveTokens.collect(modality, capacity=-(-tokens * 15 // 16 // 128) * 128)
    if live is None:
        raise RuntimeError("the bucket overflows: more than 15/16 of the tokens have a target")
    hidden, weight = (t.to(device, dtype).requires_grad_() for t in (hidden, weight))
    return hidden, weight, targets.to(device), live.to(device)


def contestants(hidden: Tensor, weight: Tensor, targets: Tensor, live: LiveTokens, ranges) -> dict[str, Callable]:
    """Functions that make a loss and both gradients."""
    count = int((targets != IGNORE).sum())

    def gradients(loss_of: Callable[..., Tensor]) -> None:
        hidden.grad = weight.grad = None
        loss_of(hidden, weight, targets).backward()

    def ours(hidden, weight, targets, **options):
        share = torch.full(targets.shape, 1 / count, device=targets.device)
        return linear_cross_entropy(hidden, weight, targets, ranges=ranges, token_weight=share, **options).loss.sum()

    found: dict[str, Callable] = {}
    if hidden.is_cuda:
        found["three matrix products (G)"] = partial(products, hidden.detach(), weight.detach())
    for mode in ("exact", "certified", "masked"):
        found[f"ours, {mode}"] = partial(ours, mode=mode, live=live)
    found["ours, exact, pads computed"] = ours
    found["F.cross_entropy, full logits"] = full_logits
    found["the same, torch.compile"] = torch.compile(full_logits)
    found |= rivals(hidden.is_cuda)
    return {name: call if name.startswith("three") else partial(gradients, call) for name, call in found.items()}


def products(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits, gradient to hidden, gradient to weight in float32: nothing else."""
    logits = hidden @ weight.T
    logits @ weight
    return torch.mm(logits.T, hidden, out_dtype=torch.float32)


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As one writes it down."""
    return F.cross_entropy((hidden @ weight.T).float(), targets, ignore_index=IGNORE)


def rivals(cuda: bool) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """What is installed here."""
    found: dict[str, Callable] = {}
    if hasattr(F, "linear_cross_entropy"):
        options = getattr(torch.nn, "LinearCrossEntropyOptions", None) or getattr(F, "LinearCrossEntropyOptions", None)
        chunked = {} if options is None else {"options": options()}
        found["F.linear_cross_entropy"] = lambda h, w, t: F.linear_cross_entropy(
            h, w, t, ignore_index=IGNORE, **chunked
        )
    if not cuda:
        return found
    if module := _module("liger_kernel.transformers"):
        loss = module.LigerFusedLinearCrossEntropyLoss
        found["Liger"] = lambda h, w, t: loss(ignore_index=IGNORE)(w, h, t)
        if "chunk_mem_const" in inspect.signature(loss.__init__).parameters:
            found["Liger, chunk_mem_const=16"] = lambda h, w, t: loss(ignore_index=IGNORE, chunk_mem_const=16)(w, h, t)
    if module := _module("cut_cross_entropy"):
        cce = module.linear_cross_entropy
        found["cut-cross-entropy, filtered"] = lambda h, w, t: cce(h, w, t, ignore_index=IGNORE)
        found["cut-cross-entropy, exact"] = lambda h, w, t: cce(h, w, t, ignore_index=IGNORE, filter_eps=None)
    if module := _module("quack.linear_cross_entropy"):
        quack = module.chunked_linear_cross_entropy
        found["QuACK"] = lambda h, w, t: quack(h, w, t, ignore_index=IGNORE)
    return found


def _module(name: str):
    """The module, or None where its package is not installed."""
    if importlib.util.find_spec(name.split(".")[0]) is None:
        print(f"{name.split('.')[0]} is not installed: left out")
        return None
    return importlib.import_module(name)


if __name__ == "__main__":
    main()
