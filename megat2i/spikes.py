"""Loss spikes: which steps are one, and which batches a run passes over once it went back before one.

Pure arithmetic on numbers that all ranks know alike. The state is part of every checkpoint, so that a resumed run
decides as an unbroken one. A spike is a loss far above its running mean. Mean and variance forget old steps, hence the
fast fall at the beginning only widens the limit; and a spike counts in them as no more than the limit, so that one
outlier does not hide the next, while a loss that stays high becomes the new normal within some dozens of steps.
"""

import math
from dataclasses import dataclass, field

SPAN = 100  # steps that the running mean remembers
MINIMUM = 16  # steps before the first verdict
FLOOR = 1e-3  # of the mean: the least standard deviation, for a loss that hardly varies
WINDOW = 200  # batches before and with a spike that are passed over, and quiet steps after which a spike is overcome
REWINDS = 3  # for one spike; each further one goes back beyond the newest checkpoint


@dataclass
class RunningStatistics:
    """Mean and variance of the last values, of which there were ``count`` in all; the weight of old ones decays."""

    mean: float = 0.0
    variance: float = 0.0
    count: int = 0

    def limit(self, sigma: float) -> float:
        """The largest value that is no spike: ``sigma`` standard deviations above the mean; at first infinite."""
        if self.count < MINIMUM:
            return math.inf
        return self.mean + sigma * max(math.sqrt(self.variance), FLOOR * abs(self.mean))

    def add(self, value: float, sigma: float) -> None:
        """Take in one value; what is not finite is left out."""
        if not math.isfinite(value):
            return
        value = min(value, self.limit(sigma))
        self.count += 1
        weight = max(1 / self.count, 1 / SPAN)
        distance = value - self.mean
        self.mean += weight * distance
        self.variance = (1 - weight) * (self.variance + weight * distance**2)


@dataclass
class Spikes:
    """Verdicts on the steps of a run, and what became of them.

    ``sigma``: standard deviations above the mean from which on a value is a spike. ``norms``: also judge the gradient
    norm. ``passed_over``: (start, stop) of batches that are left out, ascending and apart. ``rewinds``: how often the
    run went back before the present spike. ``overcome_at``: the step from which on that spike is overcome.
    ``not_finite``: steps in a row, up to the last one, whose gradient was not finite.
    """

    sigma: float = 6.0
    norms: bool = False
    loss: RunningStatistics = field(default_factory=RunningStatistics)
    grad_norm: RunningStatistics = field(default_factory=RunningStatistics)
    passed_over: list[tuple[int, int]] = field(default_factory=list)
    rewinds: int = 0
    overcome_at: int = 0
    not_finite: int = 0

    def is_spike(self, loss: float, grad_norm: float) -> bool:
        """Whether a step with this loss and gradient norm, not yet added, is a spike; a loss of NaN is one too."""
        if not math.isfinite(loss):
            return self.loss.count >= MINIMUM
        high_norm = self.norms and self.grad_norm.limit(self.sigma) < grad_norm < math.inf
        return high_norm or loss > self.loss.limit(self.sigma)

    def add(self, step: int, loss: float, grad_norm: float) -> None:
        """Take in a step that is done; its verdict comes first."""
        self.loss.add(loss, self.sigma)
        self.grad_norm.add(grad_norm, self.sigma)
        self.not_finite = 0 if math.isfinite(grad_norm) else self.not_finite + 1
        if step >= self.overcome_at:
            self.rewinds = 0

    def batch(self, step: int) -> int:
        """Number of the batch of ``step``; steps count from 1, batches from 0."""
        number = step - 1
        for start, stop in self.passed_over:
            if start <= number:
                number += stop - start
        return number

    def go_back(self, state: dict, step: int, spike: int) -> tuple[int, int]:
        """Become what it was at ``step``, by that checkpoint's ``state``, but pass over the batches up to the spike's.

        Returns the numbers of the first and the last batch of those.
        """
        first, last = self.batch(max(step, spike - WINDOW) + 1), self.batch(spike)
        passed_over, rewinds = _union([*self.passed_over, (first, last + 1)]), self.rewinds + 1
        self.restore(state)
        self.passed_over, self.rewinds, self.overcome_at = passed_over, rewinds, spike + WINDOW
        return first, last

    def state(self) -> dict:
        """All but the settings, as JSON has it; floats come back from JSON as they were."""
        return {
            "loss": [self.loss.mean, self.loss.variance, self.loss.count],
            "grad_norm": [self.grad_norm.mean, self.grad_norm.variance, self.grad_norm.count],
            "passed_over": [list(window) for window in self.passed_over],
            "rewinds": self.rewinds,
            "overcome_at": self.overcome_at,
            "not_finite": self.not_finite,
        }

    def restore(self, state: dict) -> None:
        """Take over what ``state`` gave; {} is that of a run which begins, or of a checkpoint from before spikes."""
        state = Spikes().state() | state
        self.loss, self.grad_norm = RunningStatistics(*state["loss"]), RunningStatistics(*state["grad_norm"])
        self.passed_over = [(start, stop) for start, stop in state["passed_over"]]
        self.rewinds, self.overcome_at, self.not_finite = state["rewinds"], state["overcome_at"], state["not_finite"]


def _union(windows: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same numbers in windows that are ascending and apart."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(windows):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined
