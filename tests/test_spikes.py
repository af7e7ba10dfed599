"""Which losses are spikes, which are not, and which batch a step has after windows were passed over."""

import json
import math
import random

import pytest

from megat2i.spikes import MINIMUM, SPAN, WINDOW, RunningStatistics, Spikes


def verdicts(losses: list[float], sigma: float = 6.0, norms: list[float] | None = None) -> list[int]:
    """Numbers of the steps that are spikes."""
    spikes, found = Spikes(sigma, norms=norms is not None), []
    for step, loss in enumerate(losses):
        norm = norms[step] if norms else 1.0
        if spikes.is_spike(loss, norm):
            found.append(step)
        spikes.add(step, loss, norm)
    return found


def falling(steps: int, noise: float = 0.05, seed: int = 0) -> list[float]:
    """A loss that falls fast from 9 to 3, with noise."""
    generator = random.Random(seed)
    return [3 + 6 * math.exp(-step / 40) + generator.gauss(0, noise) for step in range(steps)]


def test_a_spike_is_found_at_its_step_and_the_next_one_too():
    losses = falling(900)
    losses[600] += 3
    losses[800] = 2090.0
    losses[810] += 3
    assert verdicts(losses) == [600, 800, 810]


@pytest.mark.parametrize("seed", range(5))
def test_neither_the_fast_fall_nor_noise_is_a_spike(seed):
    assert verdicts(falling(3000, seed=seed)) == []
    assert verdicts(falling(3000, noise=0.001, seed=seed)) == []
    assert verdicts(falling(3000, seed=seed), sigma=2.0) != [], "a limit that nothing exceeds would prove nothing"


def test_only_upwards_and_after_the_first_steps():
    losses = falling(300)
    losses[200] = 0.1
    assert verdicts(losses) == []
    assert verdicts([3.0] * (MINIMUM - 1) + [300.0]) == []
    assert verdicts([3.0] * MINIMUM + [300.0]) == [MINIMUM]
    assert verdicts([3.0] * MINIMUM + [3.0 * 1.005]) == [], "a loss that did not vary at all is given some room"


def test_a_loss_that_is_not_finite_is_a_spike_and_leaves_the_mean_alone():
    losses = falling(300)
    losses[200], losses[210] = math.nan, math.inf
    assert verdicts(losses) == [200, 210]
    assert verdicts([math.nan] * 300) == []


def test_a_loss_that_stays_high_becomes_normal_within_some_dozens_of_steps():
    found = verdicts([*falling(300), *(loss + 2000 for loss in falling(300))])
    assert found[0] == 300 and 10 < len(found) < 60 and found[-1] < 400


def test_gradient_norms_count_only_where_asked():
    losses, norms = falling(300), [1.0 + 0.1 * math.sin(step) for step in range(300)]
    norms[200], norms[220] = 9.0, math.inf
    assert verdicts(losses, norms=norms) == [200]  # the engine refuses an infinite one by itself
    assert verdicts(losses) == []


def test_the_statistics_are_those_of_the_definition():
    values = [4.0, 1.0, 7.0, 2.0]
    statistics = RunningStatistics()
    for value in values:
        statistics.add(value, 6.0)
    mean = sum(values) / 4
    assert statistics.mean == pytest.approx(mean)
    assert statistics.variance == pytest.approx(sum((value - mean) ** 2 for value in values) / 4)
    for _ in range(10 * SPAN):
        statistics.add(5.0, 6.0)
    assert statistics.mean == pytest.approx(5.0, abs=1e-3) and statistics.variance < 1e-3


def test_the_state_survives_json_bit_by_bit():
    spikes = Spikes(3.0)
    for step, loss in enumerate(falling(77)):
        spikes.add(step, loss, 1 / (step + 3))
    spikes.go_back(spikes.state(), 40, 77)
    other = Spikes(3.0)
    other.restore(json.loads(json.dumps(spikes.state())))
    assert other == spikes and other.loss.count == 77
    other.restore({})
    assert other == Spikes(3.0)


def batches(spikes: Spikes, steps: int) -> list[int]:
    return [spikes.batch(step) for step in range(1, steps + 1)]


def test_batches_that_are_passed_over_are_in_no_step_and_all_others_in_one():
    spikes = Spikes()
    assert batches(spikes, 4) == [0, 1, 2, 3]
    assert spikes.go_back({}, step=2, spike=5) == (2, 4)
    assert batches(spikes, 5) == [0, 1, 5, 6, 7]
    assert spikes.go_back({}, step=3, spike=4) == (6, 6)  # a further spike, behind the first window
    assert batches(spikes, 5) == [0, 1, 5, 7, 8]
    assert spikes.go_back({}, step=1, spike=6) == (1, 9)  # a window that spans both
    assert spikes.passed_over == [(1, 10)] and batches(spikes, 3) == [0, 10, 11]


def test_no_more_batches_than_the_window_are_passed_over():
    spikes = Spikes()
    assert spikes.go_back({}, step=1000, spike=1000 + WINDOW + 50) == (1050, 1000 + WINDOW + 49)
    assert spikes.batch(1050) == 1049 and spikes.batch(1051) == 1050 + WINDOW


def test_rewinds_are_counted_until_their_spike_is_overcome():
    spikes = Spikes()
    spikes.go_back(spikes.state(), 4, 9)
    spikes.go_back(spikes.state() | {"rewinds": 0}, 2, 7)
    assert spikes.rewinds == 2
    spikes.add(6 + WINDOW, 3.0, 1.0)
    assert spikes.rewinds == 2
    spikes.add(7 + WINDOW, 3.0, 1.0)
    assert spikes.rewinds == 0
