"""Selective tuning in the parity grid: the same parameters learn alike on any layout, and the others not at all."""

import numpy as np
import pytest
from parity import Layout, Training, assert_same
from test_parity import FLOAT32, bounds, marked

from megat2i.model import freezing
from megat2i.model.freezing import is_trainable
from megat2i.model.weights import TABLES

# Of 8 layers the first four are the first half. Where four pipeline ranks share the layers, the tensor ranks of the
# middle ones hold nothing but copies of norms; "embeddings" leaves those ranks nothing and is refused.
GRID = [
    Layout.parse(line)
    for line in """
    2.2.1 sequence zero_bubble-2 embeddings
    1.2.2 sequence selective deepspeed embeddings rms_norm
    2.1.2 interleaved-2 full embeddings released
    4.2.1 zero_bubble-1 embeddings_norms released
    4.2.1 deepspeed embeddings_norms released
    1.1.2 reduce-bfloat16 embeddings_norms
    4.1.1 zero_bubble-1 selective embeddings_norms_first_half
    1.2.2 sequence deepspeed embeddings_norms_first_half
    4.1.1 zero_bubble-2 full embeddings_norms_feed_forward
    1.1.2 deepspeed embeddings_norms_feed_forward gain_only
    2.2.1 sequence bfloat16 embeddings_norms_feed_forward
    """.splitlines()
    if line.strip()
]
LAYERS = 8


def assert_selective(found: dict[str, Training], initial: dict[str, np.ndarray], policy: str) -> None:
    """What learns moved, and the rest kept its bits."""
    for training in found.values():
        moved = {name for name, values in training.weights.items() if values.tobytes() != initial[name].tobytes()}
        assert moved == {name for name in initial if is_trainable(name, policy, LAYERS)}


@pytest.mark.parametrize("layout", marked(GRID))
def test_a_selective_layout_equals_one_process(train, one_process, layout):
    found = train(layout)
    assert_same(found, one_process(layout.variant, layout.trainable), bounds(layout))
    if layout.dtype == "float32":  # else the beginning is rounded
        assert_selective(found, one_process.initial(layout.variant), layout.trainable)


def test_every_policy_meets_every_way_to_share_the_work():
    policies = {layout.trainable for layout in GRID}
    assert len(policies) == 4 and all(Layout.parse(str(layout)) == layout and layout.makes_sense for layout in GRID)
    for way in ("pipeline", "tensor", "data"):
        assert {layout.trainable for layout in GRID if getattr(layout, way) > 1} == policies, way
    assert {layout.schedule[0] for layout in GRID} == {"1f1b", "interleaved", "zero_bubble"}


@pytest.mark.parametrize("text", ["1.1.1 embeddings", "2.2.1 sequence zero_bubble-2 embeddings"])
def test_one_parameter_that_learns_against_the_policy_is_found(train, one_process, monkeypatch, text):
    layout = Layout.parse(text)
    expected = one_process(layout.variant, layout.trainable)
    monkeypatch.setattr(freezing, "is_trainable", lambda name, *_: name in (*TABLES, "layers.6.ffn_norm.bias"))
    found = train(layout)
    with pytest.raises(AssertionError, match=r"other parameters, \['layers.6.ffn_norm.bias'\]"):
        assert_same(found, expected, FLOAT32)
    with pytest.raises(AssertionError):
        assert_selective(found, one_process.initial(layout.variant), layout.trainable)


def test_a_policy_does_not_change_the_gradients_of_what_learns(one_process):
    """... in the first step; what differs are the weights after three."""
    expected, found = one_process("layer_norm", "embeddings"), one_process("layer_norm", "embeddings_norms")
    for name in TABLES:
        first, other = (of["sgd"].gradients[0][name] for of in (expected, found))
        np.testing.assert_allclose(first, other, atol=1e-6 * np.abs(other).max())
        assert not np.allclose(expected["sgd"].weights[name], found["sgd"].weights[name], rtol=1e-4)
