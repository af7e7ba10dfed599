"""Cases of the block's kernels (norms, qk-norm with rotary positions, SwiGLU) against float64, on any device."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megat2i.kernels import reference

BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}  # relative 2-norm: one rounding of a result


@dataclass(frozen=True)
class Case:
    """``op`` of module ``module`` with tensors of these shapes (made in order) and keyword options."""

    module: str
    op: str
    shapes: tuple
    options: tuple = ()
    dtype: torch.dtype = torch.float32
    strided: bool = False  # the first two tensors are halves of one


def norm(op: str, shape: tuple, bias: bool | None, dtype=torch.float32) -> Case:
    """``bias`` None: the op knows none."""
    tensors = [shape, shape] if op.startswith("add") else [shape]
    shapes = (*tensors, shape[-1:], *([shape[-1:]] if bias else [None] if bias is not None else []), 1e-5)
    return Case("norm", op, shapes, dtype=dtype)


def rope(batch, length, heads, half, weight: int, bias=False, rotary="shared", dtype=torch.float32, **options) -> Case:
    """``weight``: elements of the norm's gain, 0 for none; ``rotary``: shared, rows or none."""
    shape = (batch, length, heads * half * 2)
    table = {"shared": ("angles", length, half), "rows": ("angles", batch, 1, length, half), "none": None}[rotary]
    names = [(name, (weight,)) for name in ("q_weight", "k_weight") if weight]
    names += [(name, (weight,)) for name in ("q_bias", "k_bias") if bias]
    return Case("qk_norm_rope", "qk_norm_rope", (shape, shape, table, table, heads), (*names, *options.items()), dtype,
                strided=True)  # fmt: skip


def arguments(case: Case, device: str):
    """(positional arguments, keyword arguments, tensors that take gradients) in the dtype of the case."""
    generator = torch.Generator().manual_seed(3)
    taking = []

    def make(spec):
        if not isinstance(spec, tuple):
            return spec
        if spec[0] == "angles":
            return torch.rand(spec[1:], generator=generator).to(device)
        values = torch.randn(spec, generator=generator) + (1.0 if len(spec) == 1 else 0.3)
        taking.append(values.to(device, case.dtype).requires_grad_())
        return taking[-1]

    positional, options = [make(spec) for spec in case.shapes], {name: make(spec) for name, spec in case.options}
    if case.strided:
        packed = torch.cat((positional[0], positional[1]), dim=-1).detach().requires_grad_()
        positional[:2] = packed.chunk(2, dim=-1)
        taking[:2] = [packed]
    return positional, options, taking


def run(function: Callable, case: Case, device: str, wide: bool):
    """Results and gradients in float64 of ``function``; ``wide``: computed in float64 from the same numbers."""
    positional, options, taking = arguments(case, device)
    if wide:
        with torch.no_grad():
            for tensor in taking:
                tensor.data = tensor.data.double()
        positional, options, taking = widen(positional, options, taking, case)
    results = function(*positional, **options)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(4)
    upstream = [torch.randn(r.shape, generator=generator).to(device, case.dtype).to(r.dtype) for r in results]
    gradients = torch.autograd.grad(results, taking, upstream)
    return [tensor.detach().double() for tensor in (*results, *gradients)]


def widen(positional, options, taking, case):
    """The same arguments in float64; halves of a packed tensor are cut again."""
    wide = {id(old): old.detach().double().requires_grad_() for old in taking}
    cosine_free = [wide.get(id(value), value) for value in positional]
    if case.strided:
        packed = wide[id(taking[0])]
        cosine_free[:2] = packed.chunk(2, dim=-1)
    angles = [v.double() if isinstance(v, torch.Tensor) and id(v) not in wide and not v.requires_grad else v
              for v in cosine_free]  # fmt: skip
    return angles, {name: wide.get(id(value), value) for name, value in options.items()}, list(wide.values())


def errors(case: Case, device: str = "cpu", twin: Callable | None = None) -> list[float]:
    """Relative 2-norms of the differences from ``twin`` (default: the op's reference) in float64."""
    function = getattr(importlib.import_module(f"megat2i.kernels.{case.module}"), case.op)
    found = run(function, case, device, wide=False)
    expected = run(twin or getattr(reference, case.op), case, device, wide=True)
    return [((f - e).norm() / e.norm()).item() for f, e in zip(found, expected, strict=True)]


def check(case: Case, device: str = "cpu") -> None:
    """Raise AssertionError where a result or gradient is further off than one rounding."""
    found = errors(case, device)
    assert max(found) < BOUNDS[case.dtype], found


CASES = {  # that `make test` interprets: every op, dtype and way to norm
    "layer_norm": norm("layer_norm", (3, 5, 96), True),
    "layer_norm gain only bf16": norm("layer_norm", (37, 130), False, torch.bfloat16),
    "rms_norm fp16": norm("rms_norm", (2, 9, 64), None, torch.float16),
    "add_rms_norm bf16": norm("add_rms_norm", (19, 256), None, torch.bfloat16),
    "swiglu bf16": Case("swiglu", "swiglu", ((33, 64), (33, 64)), dtype=torch.bfloat16),
    "whole vector bf16": rope(2, 7, 4, 16, 128, dtype=torch.bfloat16, rotary="rows"),
    "each head": rope(2, 5, 3, 6, 12, centred=False, eps=1e-6),
    "rotary alone": rope(2, 6, 4, 8, 0, rotary="rows"),
}
MORE = {
    "rms_norm one row": norm("rms_norm", (1, 7), None),
    "add_layer_norm": norm("add_layer_norm", (2, 9, 33), True),
    "swiglu": Case("swiglu", "swiglu", ((2, 5, 1030), (2, 5, 1030)), strided=True),
    "whole vector": rope(2, 5, 3, 4, 24, bias=True),
    "each head with bias": rope(1, 9, 2, 8, 16, bias=True, rotary="none"),
}
