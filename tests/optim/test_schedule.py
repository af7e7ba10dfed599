"""The learning rate: open_lm's formula and its ends."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megat2i.config import OptimizerConfig, TrainingConfig
from megat2i.optim.schedule import learning_rate

OPTIMIZER = OptimizerConfig(lr=3e-4, min_lr=3e-5)


def rates(steps, warmup):
    training = TrainingConfig(steps=steps, warmup_steps=warmup)
    return [learning_rate(step, OPTIMIZER, training) for step in range(steps)]


def test_by_hand():
    found = rates(steps=8, warmup=4)
    assert found[:4] == pytest.approx([0.75e-4, 1.5e-4, 2.25e-4, 3e-4])
    assert found[4:] == pytest.approx([3e-5 + 2.7e-4 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)])


@given(st.integers(1, 60), st.data())
def test_it_rises_then_falls_within_its_bounds(steps, data):
    warmup = data.draw(st.integers(0, steps - 1))
    found = rates(steps, warmup)
    assert all(0 < rate <= 3e-4 * (1 + 1e-12) for rate in found)
    assert found[:warmup] == sorted(found[:warmup])
    assert found[warmup:] == sorted(found[warmup:], reverse=True)
    assert found[warmup] == pytest.approx(3e-4)
    assert all(rate >= 3e-5 for rate in found[warmup:])


def test_the_floor_is_reached_at_the_end_of_a_long_schedule():
    assert rates(10_000, 100)[-1] == pytest.approx(3e-5, rel=1e-5)


def test_stopping_early_does_not_change_the_schedule():
    whole = TrainingConfig(steps=50, warmup_steps=5)
    stopped = TrainingConfig(steps=50, warmup_steps=5, stop_at=20)
    shorter = TrainingConfig(steps=20, warmup_steps=5)
    assert learning_rate(19, OPTIMIZER, whole) == learning_rate(19, OPTIMIZER, stopped)
    assert learning_rate(19, OPTIMIZER, whole) != pytest.approx(learning_rate(19, OPTIMIZER, shorter))
