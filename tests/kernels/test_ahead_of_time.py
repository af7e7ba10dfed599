"""Every shipped configuration of every kernel, compiled for A100 (sm_80) and Hopper (sm_90) without either."""

import pytest
from ahead_of_time import SHARED_MEMORY, compile_for

from megat2i.kernels import norm_kernels, qk_norm_rope_kernels, swiglu_kernels
from megat2i.kernels.linear_cross_entropy import triton_kernels as head

FLOAT, INT = "*fp32", "i32"
POINTERS = {2: "*bf16", 4: "*fp32"}


def integers(*names):
    return dict.fromkeys(names, INT)


def head_configurations():
    """(name, chip, kernel, types, constants, whether it multiplies on tensor cores) of the head."""
    for table, name in ((head.LOGITS_TILES, "logits"), (head.HIDDEN_TILES, "hidden"), (head.WEIGHT_TILES, "weight")):
        for (chip, width), tiles in table.items():
            operand = POINTERS[width]
            chips = [chip] if (90, width) in table else [80, 90]  # an entry for the oldest serves the newer
            for target in chips:
                yield f"{name}-{width}-sm{target}", target, *head_kernel(name, operand, tiles), width == 2


def head_kernel(name, operand, tiles):
    """(kernel, types, constants)."""
    if name == "logits":
        types = {"x": operand, "w": operand, "e": operand, "target": "*i32", "again": "*i32"}
        types |= {"offset": FLOAT, "sums": FLOAT, "largest": FLOAT}
        types |= integers("rows", "columns", "width", "stride_x", "stride_w", "stride_e")
        return head.exponentials, types, {**tiles, "STORE": True, "REDO": False, "GROUP": 8}
    if name == "hidden":
        types = {"e": operand, "w": operand, "keep": "*i32", "total": FLOAT}
        types |= integers("rows", "columns", "width", "stride_e", "stride_w")
        return head.hidden_product, types, tiles
    types = {"e": operand, "x": operand, "kept": "*i64", "count": "*i64", "total": FLOAT}
    types |= integers("rows", "columns", "width", "stride_e", "stride_x")
    return head.weight_product, types, tiles


def block_configurations():
    """The same of the block's kernels at the paper's shape: width 2,048, 16 heads of 128, bfloat16."""
    operand = POINTERS[2]
    floats = {"eps": "fp32"}
    options = {"CENTRED": True, "HAS_BIAS": True}
    warps = {"BLOCK": 2048, "num_warps": norm_kernels.warps_for(2048)}
    types = dict.fromkeys(("x", "residual", "weight", "bias", "out", "total"), operand) | floats
    types |= integers("width", "stride_x", "stride_residual")
    yield "norm", norm_kernels.norm_forward, types, {**warps, **options, "HAS_RESIDUAL": True}
    types = dict.fromkeys(("grad_out", "grad_total", "x", "weight", "grad_x"), operand) | floats
    types |= {"grad_weight": FLOAT, "grad_bias": FLOAT} | integers("rows", "width", "stride_grad", "stride_x")
    yield "norm-backward", norm_kernels.norm_backward, types, {**warps, **options, "HAS_TOTAL": True}
    names = ("gate", "up", "out"), ("grad", "gate", "up", "grad_gate", "grad_up")
    sizes = {"BLOCK": swiglu_kernels.BLOCK, "num_warps": swiglu_kernels.WARPS}
    types = dict.fromkeys(names[0], operand) | integers("width", "stride_gate", "stride_up")
    yield "swiglu", swiglu_kernels.swiglu_forward, types, sizes
    types = dict.fromkeys(names[1], operand) | integers("width", "stride_grad", "stride_gate", "stride_up")
    yield "swiglu-backward", swiglu_kernels.swiglu_backward, types, sizes
    rope = {"HEADS": 16, "HALF": 64, "NORM": 1, "ROTARY": True, **options}
    rope["num_warps"] = qk_norm_rope_kernels.warps_for(16, 64)
    types = dict.fromkeys(("x", "weight", "bias", "out"), operand) | {"cosine": FLOAT, "sine": FLOAT} | floats
    types |= integers("length", "heads", "half", "stride_batch", "stride_token", "stride_table")
    yield "norm-rope", qk_norm_rope_kernels.norm_rope_forward, types, rope
    types = dict.fromkeys(("grad", "x", "weight", "grad_x"), operand) | floats
    types |= dict.fromkeys(("cosine", "sine", "grad_weight", "grad_bias"), FLOAT)
    types |= integers("tokens", "length", "heads", "half", "grad_batch", "grad_token", "grad_head")
    types |= integers("stride_batch", "stride_token", "stride_table")
    yield "norm-rope-backward", qk_norm_rope_kernels.norm_rope_backward, types, rope


CONFIGURATIONS = {name: rest for name, *rest in head_configurations()}
for chip in SHARED_MEMORY:
    for name, *rest in block_configurations():
        CONFIGURATIONS[f"{name}-sm{chip}"] = (chip, *rest, False)
# What else a call may ask of the same kernels: (configuration, changed constants).
VARIANTS = (
    ("logits-2-sm90", {"STORE": False, "REDO": True}),
    ("logits-2-sm80", {"STORE": True, "REDO": True}),
    ("norm-sm90", {"CENTRED": False, "HAS_BIAS": False, "HAS_RESIDUAL": False, "BLOCK": 8192, "num_warps": 16}),
    ("norm-backward-sm90", {"CENTRED": False, "HAS_BIAS": False, "HAS_TOTAL": False, "BLOCK": 8192, "num_warps": 16}),
    ("norm-rope-sm90", {"NORM": 0, "CENTRED": False, "HAS_BIAS": False}),
    ("norm-rope-sm80", {"NORM": 2, "CENTRED": False, "HAS_BIAS": False, "ROTARY": False}),
    ("norm-rope-backward-sm90", {"NORM": 0, "CENTRED": False, "HAS_BIAS": False}),
    ("norm-rope-backward-sm80", {"NORM": 2, "CENTRED": False, "HAS_BIAS": False, "ROTARY": False}),
)


@pytest.mark.parametrize(("name", "changed"), VARIANTS, ids=lambda value: value if isinstance(value, str) else "")
def test_variants_compile_without_spills(name, changed):
    chip, kernel, types, constants, _ = CONFIGURATIONS[name]
    found = compile_for(chip, kernel, types, constants | changed)
    assert found.stack == 0 and found.shared <= SHARED_MEMORY[chip] and found.vector_loads > 0


@pytest.mark.parametrize("chip", SHARED_MEMORY)
def test_the_heads_small_kernels_compile(chip):
    types = {"x": "*bf16", "w": "*bf16", "local_row": "*i64", "out": FLOAT} | integers("width", "stride_x", "stride_w")
    dots = compile_for(chip, head.row_logits, types, {"BLOCK": 1024})
    assert dots.stack == 0 and dots.vector_loads > 0
    types = dict.fromkeys(("sums", "largest", "offset", "log_sum", "top"), FLOAT) | integers("rows", "first", "last")
    assert compile_for(chip, head.combine, types, {"BLOCK": 128}).stack == 0


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_it_compiles_within_the_chips_resources(name):
    chip, kernel, types, constants, multiplies = CONFIGURATIONS[name]
    found = compile_for(chip, kernel, types, constants)
    assert found.stack == 0, f"{found.stack} bytes of registers spilled"
    assert found.shared <= SHARED_MEMORY[chip]
    assert found.vector_loads > 0
    assert not multiplies or found.tensor_core > 0


def test_spills_and_missing_vectors_are_noticed():
    chip, kernel, types, constants, _ = CONFIGURATIONS["logits-2-sm80"]
    few_warps = compile_for(chip, kernel, types, constants | {"num_warps": 2, "COLUMNS": 128})
    assert few_warps.stack > 0
    unaligned = compile_for(chip, kernel, types, constants, multiples=("nothing",))
    aligned = compile_for(chip, kernel, types, constants)
    assert unaligned.vector_loads < aligned.vector_loads
    large = compile_for(chip, kernel, types, constants | {"num_stages": 9})
    assert large.shared > SHARED_MEMORY[chip]
