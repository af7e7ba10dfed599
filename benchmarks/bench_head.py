"""The loss head, forward and backward, beside its rivals on the same tensors in the same run.

    python benchmarks/bench_head.py [--json FILE] [--minutes M] [--rounds R] [--tokens N ...] [--width D] [--sweep]

Ours in every mode against G, the three bare matrix products (logits, both gradients) that no exact head can do
without; PyTorch on full logits, eager and compiled; ``F.linear_cross_entropy`` where this PyTorch has it; and what is
installed of Liger (its default chunk and ``chunk_mem_const=16``), Apple's cut-cross-entropy (exact and filtered) and
QuACK. Rivals see one vocabulary of all rows and a mean; ours reports per token and modality. 97 % of the targets are
image codes, a twelfth of the tokens has no target. "flat" are random states; "trained" ones know target and modality.

``--sweep`` times our three products alone under other tiles and prints the best of each table, the shipped tiles beside
it, to be written into kernels/linear_cross_entropy/triton_kernels.py.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from functools import partial

import sweep_head
import torch
from harness import Record, parser_for, report, take_turns
from torch import Tensor
from torch.nn import functional as F

from megat2i.kernels import LiveTokens, linear_cross_entropy

IGNORE = -100


def main() -> None:
    """Run every size and kind of logits."""
    cuda, parser = torch.cuda.is_available(), parser_for(__doc__)
    parser.add_argument("--tokens", type=int, nargs="*", default=[8_192, 36_864] if cuda else [2_048])
    parser.add_argument("--width", type=int, default=2_048 if cuda else 256)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), nargs="*", default=["bfloat16"])
    parser.add_argument("--rounds", type=int, default=30 if cuda else 5)
    parser.add_argument("--sweep", action="store_true", help="other tiles instead of rivals; needs a GPU")
    arguments = parser.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    ranges = ((0, 50_284), (50_432, 66_816)) if cuda else ((0, 12_000), (12_032, 16_128))
    record = Record("head_sweep" if arguments.sweep else "head", arguments.json, device, arguments.minutes)
    if arguments.sweep:
        sweep_head.sweep(arguments, ranges, device, record)
        return record.finish()
    for name in arguments.dtype:
        for tokens in arguments.tokens:
            for kind in ("flat", "trained"):
                tensors = make(tokens, arguments.width, ranges, kind, device, getattr(torch, name))
                results = take_turns(contestants(*tensors, ranges), arguments.rounds, device, record)
                work = 6 * tokens * arguments.width * ranges[-1][1]
                base = "three matrix products (G)" if cuda else "F.cross_entropy, full logits"
                title = f"{name}, N = {tokens:,}, D = {arguments.width:,}, V = {ranges[-1][1]:,}, {kind} logits"
                report(title, results, base, lambda row, work=work: f"{work / row['ms'] / 1e9:9.1f} TFLOP/s")
                for row in results.values():
                    sizes = [tokens, arguments.width, ranges[-1][1]]
                    row |= {"tflops": work / row["ms"] / 1e9, "sizes": sizes} if "ms" in row else {}
                record.add(title, results)
                torch._dynamo.reset()
    record.finish()


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


def contestants(hidden: Tensor, weight: Tensor, targets: Tensor, live: LiveTokens, ranges) -> dict:
    """Functions that make a loss and both gradients, or why there is none."""
    count = int((targets != IGNORE).sum())

    def gradients(loss_of: Callable[..., Tensor]) -> None:
        hidden.grad = weight.grad = None
        loss_of(hidden, weight, targets).backward()

    def ours(hidden, weight, targets, **options):
        share = torch.full(targets.shape, 1 / count, device=targets.device)
        return linear_cross_entropy(hidden, weight, targets, ranges=ranges, token_weight=share, **options).loss.sum()

    found: dict[str, Callable | str] = {}
    if hidden.is_cuda:
        found["three matrix products (G)"] = partial(products, hidden.detach(), weight.detach())
    for mode in ("exact", "certified", "masked"):
        found[f"ours, {mode}"] = partial(ours, mode=mode, live=live)
    found["ours, exact, pads computed"] = ours
    found["F.cross_entropy, full logits"] = full_logits
    found["the same, torch.compile"] = torch.compile(full_logits)
    found |= rivals(hidden.is_cuda)
    plain = ("three matrix products (G)",)
    return {
        name: call if isinstance(call, str) or name in plain else partial(gradients, call)
        for name, call in found.items()
    }


def products(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits, gradient to hidden, gradient to weight in float32: nothing else."""
    logits = hidden @ weight.T
    logits @ weight
    return torch.mm(logits.T, hidden, out_dtype=torch.float32)


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As one writes it down."""
    return F.cross_entropy((hidden @ weight.T).float(), targets, ignore_index=IGNORE)


def rivals(cuda: bool) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor] | str]:
    """What is installed here, and why the others are not."""
    found: dict[str, Callable | str] = {"F.linear_cross_entropy": f"PyTorch {torch.__version__} has none"}
    if hasattr(F, "linear_cross_entropy"):
        options = getattr(torch.nn, "LinearCrossEntropyOptions", None) or getattr(F, "LinearCrossEntropyOptions", None)
        chunked = {} if options is None else {"options": options()}
        found["F.linear_cross_entropy"] = lambda h, w, t: F.linear_cross_entropy(
            h, w, t, ignore_index=IGNORE, **chunked
        )
    for name, module, make in (
        ("Liger", "liger_kernel.transformers", liger),
        ("cut-cross-entropy", "cut_cross_entropy", cut_cross_entropy),
        ("QuACK", "quack.linear_cross_entropy", quack),
    ):
        if not cuda or importlib.util.find_spec(module.split(".")[0]) is None:
            found[name] = "not installed" if cuda else "needs a GPU"
            continue
        try:
            found |= make(importlib.import_module(module))
        except Exception as error:  # made for other versions: said in the table
            found[name] = f"installed, but {type(error).__name__}: {error}"
    return found


def liger(module) -> dict[str, Callable]:
    loss = module.LigerFusedLinearCrossEntropyLoss
    found = {"Liger": lambda h, w, t: loss(ignore_index=IGNORE)(w, h, t)}
    if "chunk_mem_const" in inspect.signature(loss.__init__).parameters:
        found["Liger, chunk_mem_const=16"] = lambda h, w, t: loss(ignore_index=IGNORE, chunk_mem_const=16)(w, h, t)
    return found


def cut_cross_entropy(module) -> dict[str, Callable]:
    call = module.linear_cross_entropy
    return {
        "cut-cross-entropy, filtered": lambda h, w, t: call(h, w, t, ignore_index=IGNORE),
        "cut-cross-entropy, exact": lambda h, w, t: call(h, w, t, ignore_index=IGNORE, filter_eps=None),
    }


def quack(module) -> dict[str, Callable]:
    return {"QuACK": lambda h, w, t: module.chunked_linear_cross_entropy(h, w, t, ignore_index=IGNORE)}


if __name__ == "__main__":
    main()
