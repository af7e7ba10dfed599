"""Triton's CPU interpreter made right for bfloat16: installed by ``megat2i.kernels`` under TRITON_INTERPRET=1.

As shipped (3.6 to 3.9) the interpreter keeps bfloat16 as bit patterns in numpy's uint16, truncates where hardware
rounds to nearest even, and multiplies the patterns as integers in ``tl.dot``, all without an error. ``install``
replaces the casts and the operands of ``tl.dot``. Sums and products of two bfloat16 values stay wrong: kernels upcast
after loading.
"""

import os

import torch

CASTS = ("fp_ext", "fp_trunc", "si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui")


def interpreting() -> bool:
    """Whether Triton runs its kernels in the interpreter in this process."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def install() -> None:
    """Patch the interpreter once; raises RuntimeError where this Triton's interpreter has other parts than expected."""
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    missing = [name for name in ("cast_impl", "create_dot", "create_int_cast") if not hasattr(builder, name)]
    missing += [name for name in CASTS if not hasattr(builder, f"create_{name}")]
    if missing:
        raise RuntimeError(
            f"the interpreter of triton {triton.__version__} has no {', '.join(missing)}: "
            "megat2i.kernels.interpreter knows 3.6 to 3.9; unset TRITON_INTERPRET or use one of those"
        )
    if getattr(builder.cast_impl, "rounds_bfloat16", False):
        return
    plain_cast, plain_dot = builder.cast_impl, builder.create_dot

    def cast_impl(self, source, destination):
        old, new = source.dtype.scalar, destination.scalar
        if old == tl.float32 and new == tl.bfloat16:
            bits = torch.from_numpy(source.data.astype("float32")).bfloat16().view(torch.int16)
            return interpreter.TensorHandle(bits.numpy().view("uint16"), new)
        if old == tl.bfloat16 and new == tl.float32:
            return interpreter.TensorHandle(widen(source.data), new)
        return plain_cast(self, source, destination)

    def widen(bits):
        return (bits.astype("uint32") << 16).view("float32")

    def create_dot(self, a, b, accumulator, precision, max_imprecise):
        def operand(handle):
            if handle.dtype.scalar == tl.bfloat16:
                return interpreter.TensorHandle(widen(handle.data), tl.float32)
            return handle

        return plain_dot(self, operand(a), operand(b), accumulator, precision, max_imprecise)

    cast_impl.rounds_bfloat16 = True
    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    for name in CASTS:  # in the class these are bound to the old function
        setattr(builder, f"create_{name}", lambda self, source, kind: self.cast_impl(source, kind))
    builder.create_int_cast = lambda self, source, kind, is_signed: self.cast_impl(source, kind)
