"""The block's elementwise kernels, forward and backward, beside PyTorch eager and compiled and Liger, in one run.

    python benchmarks/bench_block.py [--json FILE] [--minutes M] [--rounds R] [--tokens N] [--width D] [--sweep]

Each op is given as time, and as a fraction of the bandwidth of a plain copy measured in the same run: the bytes that
the op must move (inputs and results once, forward and backward) over its time. On a CPU our Triton kernels do not run
(interpreting is no measurement), and "ours" are the operations that ``choose_ops`` takes there. Inputs are put back
before every turn, untimed: Liger's backward passes write over them. ``--sweep`` times ours alone under other numbers of
warps and elements a program.
"""

import importlib
import importlib.util
from collections.abc import Callable

import torch
from harness import Record, copy_bandwidth, parser_for, report, take_turns
from torch import Tensor

from megat2i.kernels import choose_ops, reference


def main() -> None:
    """Run every op."""
    cuda, parser = torch.cuda.is_available(), parser_for(__doc__)
    parser.add_argument("--tokens", type=int, default=36_864 if cuda else 2_048)
    parser.add_argument("--width", type=int, default=2_048 if cuda else 512)
    parser.add_argument("--heads", type=int, default=16 if cuda else 8)
    parser.add_argument("--ffn", type=int, default=5_504 if cuda else 1_408)
    parser.add_argument("--rounds", type=int, default=50 if cuda else 7)
    parser.add_argument("--sweep", action="store_true", help="other launches of ours instead of rivals; needs a GPU")
    arguments = parser.parse_args()
    device = torch.device("cuda" if cuda else "cpu")
    record = Record("block_sweep" if arguments.sweep else "block", arguments.json, device, arguments.minutes)
    if arguments.sweep and not cuda:
        raise SystemExit("error: --sweep needs a GPU: Triton's kernels do not run here")
    copied = copy_bandwidth(arguments.tokens * arguments.width * 8, arguments.rounds, device)
    print(f"copy: {copied:.0f} GB/s")
    record.add("copy", {"device to device": {"gb_per_s": copied}})
    for name, make, passes in OPS:
        calls, inputs, elements = make(arguments, device)
        if arguments.sweep:
            calls = launches(name, calls["ours"])
        work = {who: call if isinstance(call, str) else training_step(call, inputs) for who, call in calls.items()}
        results = take_turns(work, arguments.rounds, device, record)
        needed = passes * elements * 2 / 1e9  # bfloat16
        title = f"{name}, {arguments.tokens:,} tokens, width {arguments.width:,}, bfloat16"
        report(title, results, "ours", lambda row, n=needed: f"{n / row['ms'] * 1e3 / copied:8.0%} of copy")
        for row in results.values():
            row |= {"of_copy": needed / row["ms"] * 1e3 / copied} if "ms" in row else {}
        record.add(title, results)
    record.finish()


def training_step(call: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], None]:
    """Forward and backward from an upstream gradient that is there already."""
    with torch.no_grad():
        upstream = [torch.randn_like(result) for result in _several(call(*inputs))]
    originals = [tensor.detach().clone() for tensor in (*inputs, *upstream)]

    def step() -> None:
        torch.autograd.grad(_several(call(*inputs)), inputs, upstream)

    def prepare() -> None:
        with torch.no_grad():
            for tensor, original in zip((*inputs, *upstream), originals, strict=True):
                tensor.copy_(original)

    step.prepare = prepare
    return step


def launches(op: str, call: Callable) -> dict[str, Callable]:
    """Our op under other launches; its first contestant is as shipped."""
    found, kernels = {"ours": call}, importlib.import_module(f"megat2i.kernels.{KERNELS[op]}")

    def changed(**values) -> Callable:
        def run(*inputs):
            before = {name: getattr(kernels, name) for name in values}
            try:
                for name, value in values.items():
                    setattr(kernels, name, value)
                return call(*inputs)
            finally:
                for name, value in before.items():
                    setattr(kernels, name, value)

        return run

    if op == "SwiGLU":
        for block in (512, 1_024, 2_048, 4_096):
            found |= {f"{block} elements, {w} warps": changed(BLOCK=block, WARPS=w) for w in (2, 4, 8)}
        return found
    return found | {f"{w} warps": changed(warps_for=lambda *_, w=w: w) for w in (2, 4, 8, 16)}


def _several(result) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def tensors(device: torch.device, *shapes) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    return [tensor.to(device, torch.bfloat16).requires_grad_() for tensor in made]


def everyone(device: torch.device, ours: Callable, plain: Callable, rival: Callable | str | None) -> dict:
    found = {"ours": ours, "PyTorch eager": plain, "PyTorch compiled": torch.compile(plain)}
    return found | {"Liger": rival or ("not installed" if device.type == "cuda" else "needs a GPU")}


def liger(name: str) -> Callable | None:
    """A function of Liger's, or None where it is not installed or the machine has no GPU."""
    if importlib.util.find_spec("liger_kernel") is None or not torch.cuda.is_available():
        return None
    return getattr(importlib.import_module("liger_kernel.transformers.functional"), name)


def layer_norm(a, device):
    ops, inputs = choose_ops(device, torch.bfloat16), tensors(device, (a.tokens, a.width), a.width, a.width)
    plain = torch.nn.functional.layer_norm
    rival = liger("liger_layer_norm")
    calls = everyone(
        device,
        lambda x, w, b: ops.layer_norm(x, w, b, 1e-5),
        lambda x, w, b: plain(x, w.shape, w, b, 1e-5),
        rival and (lambda x, w, b: rival(x, w, b, 1e-5)),
    )
    return calls, inputs, a.tokens * a.width


def add_rms_norm(a, device):
    ops = choose_ops(device, torch.bfloat16)
    inputs = tensors(device, (a.tokens, a.width), (a.tokens, a.width), a.width)
    rival = liger("liger_fused_add_rms_norm")
    calls = everyone(
        device,
        lambda x, r, w: ops.add_rms_norm(x, r, w, 1e-5),
        lambda x, r, w: (torch.nn.functional.rms_norm(x + r, w.shape, w, 1e-5), x + r),
        rival and (lambda x, r, w: rival(x, r, w, 1e-5)),
    )
    return calls, inputs, a.tokens * a.width


def qk_norm_rope(a, device):
    ops, length = choose_ops(device, torch.bfloat16), 1_024 if device.type == "cuda" else 128
    batch, half = a.tokens // length, a.width // a.heads // 2
    inputs = tensors(device, (batch, length, a.width), (batch, length, a.width), a.width, a.width)
    angles = torch.arange(length, device=device)[:, None] * 1e4 ** -(torch.arange(half, device=device) / half)
    tables = angles.cos(), angles.sin()

    def call(function):
        return lambda q, k, u, w: function(q, k, *tables, a.heads, q_weight=u, k_weight=w)

    return (
        everyone(device, call(ops.qk_norm_rope), call(reference.qk_norm_rope), "has no such op"),
        inputs,
        2 * a.tokens * a.width,
    )


def swiglu(a, device):
    ops, inputs = choose_ops(device, torch.bfloat16), tensors(device, (a.tokens, a.ffn), (a.tokens, a.ffn))
    rival = liger("liger_swiglu")
    return everyone(device, ops.swiglu, reference.swiglu, rival), inputs, a.tokens * a.ffn


KERNELS = {  # modules with the numbers of warps, by op
    "LayerNorm": "norm_kernels",
    "residual + RMSNorm": "norm_kernels",
    "qk-norm + rotary positions": "qk_norm_rope_kernels",
    "SwiGLU": "swiglu_kernels",
}
# name, maker, passes over the elements that forward and backward must make
OPS = (
    ("LayerNorm", layer_norm, 2 + 3),
    ("residual + RMSNorm", add_rms_norm, 4 + 4),
    ("qk-norm + rotary positions", qk_norm_rope, 2 + 3),
    ("SwiGLU", swiglu, 3 + 5),
)


if __name__ == "__main__":
    main()
