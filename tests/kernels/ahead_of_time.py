"""Compiles Triton kernels for a GPU that is not there, and reads the result's resources."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_MEMORY = {80: 166_912, 90: 232_448}  # bytes a block may have: A100; H100 and H200
SPECIALISED = ("stride", "grad_", "width", "half")  # integers that the paper's shapes make multiples of 16


class Resources(NamedTuple):
    """What a compiled kernel uses and contains."""

    stack: int  # bytes: above 0, registers are spilled
    registers: int
    shared: int  # bytes
    tensor_core: int  # instructions
    vector_loads: int


def compile_for(chip: int, kernel, types: dict[str, str], constants: dict, multiples=SPECIALISED) -> Resources:
    """Compile ``kernel`` for compute capability ``chip``; every argument is in ``types`` or ``constants``.

    Pointers and the integers whose name begins with one of ``multiples`` are taken to be divisible by 16, as Triton
    finds them when the kernel is called.
    """
    if not isinstance(kernel, triton.runtime.jit.JITFunction):  # imported under TRITON_INTERPRET=1
        kernel = triton.runtime.jit.JITFunction(kernel.fn)
    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    constants = {name: value for name, value in constants.items() if name not in options}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    assert set(signature) == set(types) | set(constants), set(signature) ^ (set(types) | set(constants))
    divisible = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name in types and (types[name].startswith("*") or name.startswith(multiples))
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (_dump(flag, file.name) for flag in ("-res-usage", "-sass"))
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return Resources(
        stack=stack,
        registers=registers,
        shared=compiled.metadata.shared,
        tensor_core=len(re.findall(r"\b(?:HMMA|HGMMA)\b", code)),
        vector_loads=len(re.findall(r"ld\.global\S*\.v[248]|cp\.async", compiled.asm["ptx"])),
    )


def _dump(flag: str, file: str) -> str:
    return subprocess.run([TOOLS / "cuobjdump", flag, file], capture_output=True, text=True, check=True).stdout
