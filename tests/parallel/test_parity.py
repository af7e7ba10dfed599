"""The parity grid: a step under any layout equals the step of one process, in every number that can be compared."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from parity import (
    AXES,
    OPTIMIZERS,
    Layout,
    assemble_copies,
    assemble_parts,
    assert_same,
    differences,
    layouts_that_make_sense,
    relative,
)

from megat2i.parallel.shard import Box, Shard

# pipeline.tensor.data and what is not the default. The first ones are the least that holds every pair of AXES' values.
GRID = [
    Layout.parse(line)
    for line in """
    1.1.1 released
    2.1.1 interleaved-2 selective
    1.1.2 zero_bubble-1 full rms_norm
    4.1.1 zero_bubble-2 gain_only
    1.2.1 sequence zero_bubble-1 deepspeed
    1.1.4 selective reduce-bfloat16 gain_only
    2.1.2 zero_bubble-2 bfloat16 reduce-bfloat16 rms_norm
    2.1.1 interleaved-2 full deepspeed bfloat16 released
    1.2.2 sequence full reduce-bfloat16 released
    1.1.4 zero_bubble-1 selective bfloat16 released
    4.1.1 selective deepspeed rms_norm
    4.1.2 interleaved-2 full reduce-bfloat16
    1.4.1 full released
    2.2.1 sequence interleaved-2 selective gain_only
    2.1.4 zero_bubble-2 full
    2.1.2 zero_bubble-1 full deepspeed reduce-bfloat16 gain_only
    2.1.2 selective bfloat16
    2.1.4 interleaved-2 reduce-bfloat16 rms_norm
    4.2.1 sequence zero_bubble-2 bfloat16 released
    1.4.1 sequence zero_bubble-1 deepspeed rms_norm
    2.4.1 zero_bubble-2 selective deepspeed gain_only
    1.2.1 zero_bubble-1 rms_norm
    4.1.1 zero_bubble-1 bfloat16 gain_only
    1.2.4 sequence deepspeed released
    1.4.2 reduce-bfloat16
    2.4.1 interleaved-2 selective bfloat16 released

    1.1.1 bfloat16
    1.1.1 deepspeed
    1.1.8 deepspeed
    1.2.1
    1.2.1 sequence
    1.2.1 sequence selective bfloat16
    1.8.1 released
    2.1.1
    2.1.1 zero_bubble-1
    2.2.1 full
    2.2.1 zero_bubble-1 selective rms_norm
    2.2.2 sequence interleaved-2
    2.2.2 sequence zero_bubble-2 selective
    2.2.2 sequence zero_bubble-1 full deepspeed
    2.2.2 deepspeed bfloat16
    4.1.1
    4.1.2 interleaved-2
    4.2.1 sequence zero_bubble-1 full
    8.1.1 zero_bubble-1

    1.2.1 qwen3
    1.4.1 sequence selective qwen3
    2.2.2 sequence interleaved-2 full qwen3
    2.1.1 zero_bubble-1 deepspeed qwen3
    1.2.2 sequence full gelu_tied
    1.4.1 selective gelu_tied
    1.2.2 deepspeed gelu_tied
    """.splitlines()
    if line.strip()
]

FLOAT32 = {
    "counts": 0,
    "correct": 1,  # a near tie may go either way
    "loss": 1e-5,
    "off_range": 1e-5,
    "norm": 1e-5,
    "gradient": 1e-5,
    "gradient of a tensor": 1e-5,
    "weights": 1e-5,
    "weights of a tensor": 1e-5,
}
# What is sent between data-parallel ranks carries 8 bits: 2^-9 = 2e-3 for each of two roundings.
REDUCED_IN_BFLOAT16 = {
    "counts": 0,
    "correct": 1,
    "loss": 5e-4,
    "off_range": 1e-4,
    "norm": 5e-4,
    "gradient": 5e-3,
    "gradient of a tensor": 1e-2,
    "weights": 3e-4,
    "weights of a tensor": 1e-2,
}
# Against one process in float32. One process in bfloat16 differs from that by 3.4e-2 in the gradient (9e-2 in that of a
# small bias): a layout may be no worse than that, rounding apart.
BFLOAT16 = {
    "counts": 0,
    "correct": 4,
    "loss": 1e-2,
    "off_range": 3e-3,
    "norm": 1.5e-2,
    "gradient": 4.5e-2,
    "gradient of a tensor": 0.12,
    "weights": 4e-3,
    "weights of a tensor": 0.1,
}


def bounds(layout: Layout) -> dict[str, float]:
    if layout.dtype == "bfloat16":
        return BFLOAT16
    return FLOAT32 if layout.reduce_dtype == "float32" else REDUCED_IN_BFLOAT16


def marked(layouts: list[Layout]) -> list:
    return [pytest.param(x, marks=pytest.mark.slow if x.engine == "deepspeed" else (), id=str(x)) for x in layouts]


@pytest.mark.parametrize("layout", marked(GRID))
def test_a_layout_equals_one_process(train, one_process, layout):
    assert_same(train(layout), one_process(layout.variant), bounds(layout))


def every_mesh() -> list[Layout]:
    """Every mesh of up to eight ranks with every schedule, and with sequence parallelism; the other axes in turn."""
    sizes = {axis: (1, 2, 4, 8) for axis in ("pipeline", "tensor", "data")}
    meshes = layouts_that_make_sense(AXES | sizes | {axis: AXES[axis][:1] for axis in list(AXES)[5:]})
    in_turn = ("recompute", "variant")
    return [
        replace(
            mesh,
            engine="deepspeed" if number % 5 == 4 else "torch",
            **{axis: AXES[axis][number % len(AXES[axis])] for axis in in_turn},
        )
        for number, mesh in enumerate(meshes)
    ]


@pytest.mark.full
@pytest.mark.parametrize("layout", marked(every_mesh()))
def test_every_mesh_equals_one_process(train, one_process, layout):
    assert_same(train(layout), one_process(layout.variant), bounds(layout))


def value_pairs(layout: Layout) -> set:
    return {((a, getattr(layout, a)), (b, getattr(layout, b))) for a, b in combinations(AXES, 2)}


def test_every_pair_of_axis_values_occurs():
    assert len(GRID) >= 40 and len(set(GRID)) == len(GRID)
    assert all(layout.makes_sense for layout in GRID)
    possible = set().union(*map(value_pairs, layouts_that_make_sense(AXES)))
    found = set().union(*map(value_pairs, GRID))
    assert len(possible) > 300 and possible <= found
    without = [layout for layout in GRID if (layout.pipeline, layout.tensor) != (4, 2)]
    assert not possible <= set().union(*map(value_pairs, without))  # the check can fail


def test_a_layout_is_read_as_it_is_written():
    for layout in GRID:
        assert Layout.parse(str(layout)) == layout
    assert Layout.parse("2.4.1 sequence zero_bubble-2 full") == Layout(
        2, 4, 1, True, schedule=("zero_bubble", 2), recompute="full"
    )


@pytest.mark.parametrize("variant", AXES["variant"])
def test_one_process_trains_so_that_a_difference_would_show(one_process, variant):
    trained = one_process(variant)
    for optimizer, training in trained.items():
        start = one_process.initial(variant)
        assert (training.sums[:, 3] > 0).all()
        for name, after in training.weights.items():
            assert relative(after, start[name]) > 20 * FLOAT32["weights of a tensor"], (optimizer, name)
    assert (trained["adamw"].norms > 1.2 * OPTIMIZERS["adamw"][0].clip).all(), "clipping must be at work"


def test_the_sgd_of_the_grid_is_sgd(one_process):
    """Three updates by hand, with the gradients that the grid compares."""
    training, weights = one_process("layer_norm")["sgd"], one_process.initial("layer_norm")
    for gradient in training.gradients:
        weights = {name: values - 0.3 * gradient[name] for name, values in weights.items()}
    for name, values in weights.items():
        np.testing.assert_allclose(training.weights[name], values, rtol=1e-6, atol=1e-7)
    squares = [sum(float((g.astype(np.float64) ** 2).sum()) for g in step.values()) for step in training.gradients]
    np.testing.assert_allclose(training.norms, np.sqrt(squares), rtol=1e-6)


def test_the_bounds_of_bfloat16_are_not_wider_than_its_rounding(train, one_process):
    found, expected = train(Layout(dtype="bfloat16")), one_process("layer_norm")
    for optimizer, training in found.items():
        for quantity, difference in differences(training, expected[optimizer]).items():
            if quantity.startswith(("gradient", "weights")):
                assert difference > 0.35 * BFLOAT16[quantity], (optimizer, quantity)


def test_ranks_and_micro_batches_see_modalities_in_very_different_shares(make_batches, tiny_config):
    layout = Layout(pipeline=2, data=2)
    config = layout.config(tiny_config, "sgd")
    shares = []
    for rank in range(2):
        batches = make_batches(config, 0, rank, 2)
        assert len(batches) == layout.micro_batches
        shares.append([float((b.modality == 1).sum() / (b.modality >= 0).sum()) for b in batches])
    assert min(shares[0]) < 0.2 and max(shares[1]) > 0.8
    assert abs(np.mean(shares[0]) - np.mean(shares[1])) > 0.3
    assert all(max(of_rank) - min(of_rank) > 0.2 for of_rank in shares)


def test_assembling_notices_holes_overlaps_and_unequal_copies():
    shard = Shard((4, 2), 0, ((0, 1), (2, 3)))
    rest = Shard((4, 2), 0, ((1, 2), (3, 4)))
    ones = np.ones((2, 2), np.float32)
    tensors, unequal = assemble_copies([{"x": (shard, ones)}, {"x": (rest, 2 * ones)}, {"x": (rest, 2 * ones)}])
    assert tensors["x"][:, 0].tolist() == [1, 2, 1, 2] and not unequal
    with pytest.raises(AssertionError, match="no rank holds"):
        assemble_copies([{"x": (shard, ones)}])
    assert assemble_copies([{"x": (shard, ones)}, {"x": (rest, ones)}, {"x": (rest, 2 * ones)}])[1] == ["x"]
    part = ("x", (4,), [Box((0,), (3,))], np.ones(3, np.float32))
    with pytest.raises(AssertionError, match=r"come \[0, 1\] times"):
        assemble_parts([[part]])
    with pytest.raises(AssertionError, match=r"come \[1, 2\] times"):
        assemble_parts([[part], [("x", (4,), [Box((2,), (4,))], np.ones(2, np.float32))]])
    with pytest.raises(AssertionError, match="values"):
        assemble_parts([[("x", (4,), [Box((0,), (4,))], np.ones(5, np.float32))]])


def test_the_comparison_notices_one_wrong_element(one_process):
    expected = one_process("layer_norm")
    training = expected["sgd"]
    name = "layers.3.attention.in_proj.weight"
    for quantity, field in (("gradient", "gradients"), ("weights", "weights")):
        wrong = {n: v.copy() for n, v in (training.gradients[1] if field == "gradients" else training.weights).items()}
        wrong[name][5, 7] += 1e-3 * np.linalg.norm(wrong[name])
        value = [training.gradients[0], wrong, training.gradients[2]] if field == "gradients" else wrong
        with pytest.raises(AssertionError, match=f"{quantity} of a tensor"):
            assert_same({"sgd": replace(training, **{field: value})}, expected, FLOAT32)
    for row, quantity in enumerate(("loss", "correct", "off_range", "counts")):
        sums = training.sums.copy()
        sums[1, row, 2] += 2 if quantity in ("correct", "counts") else 1e-4 * sums[1, row, 2]
        with pytest.raises(AssertionError, match=f"sgd: {quantity}"):
            assert_same({"sgd": replace(training, sums=sums)}, expected, FLOAT32)
    with pytest.raises(AssertionError, match="copies of x differ"):
        assert_same({"sgd": replace(training, disagreements=("copies of x differ",))}, expected, FLOAT32)
    with pytest.raises(AssertionError, match="norm differs by nan"):
        assert_same({"sgd": replace(training, norms=training.norms * torch.nan)}, expected, FLOAT32)
