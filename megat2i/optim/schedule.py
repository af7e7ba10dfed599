"""The learning rate of every step: linear warm-up, then cosine to a floor (open_lm scheduler.py)."""

import math

from megat2i.config import OptimizerConfig, TrainingConfig


def learning_rate(step: int, optimizer: OptimizerConfig, training: TrainingConfig) -> float:
    """Learning rate of ``step``, counted from 0, over a schedule of ``training.steps``."""
    if step < training.warmup_steps:
        return optimizer.lr * (step + 1) / training.warmup_steps
    progress = (step - training.warmup_steps) / (training.steps - training.warmup_steps)
    return optimizer.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (optimizer.lr - optimizer.min_lr)
