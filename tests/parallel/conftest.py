"""Fixtures of the parity grid."""

import warnings

import numpy as np
import pytest
from distributed import run_ranks
from parity import OPTIMIZERS, Layout, Training, assemble, train_on_rank


@pytest.fixture(scope="session")
def train(make_training, make_batches, tiny_config):
    """Function of (Layout, mistake, optimizers) -> {optimizer: Training}.

    ``mistake``: called on every rank before it starts, to break something there.
    """

    def on_rank(layout: Layout, mistake, optimizers):
        warnings.simplefilter("ignore")
        if mistake is not None:
            mistake()
        return {
            optimizer: train_on_rank(
                make_training,
                make_batches,
                layout.config(tiny_config, optimizer),
                layout.engine,
                OPTIMIZERS[optimizer][1],
            )
            for optimizer in optimizers
        }

    def run(layout: Layout, mistake=None, optimizers=tuple(OPTIMIZERS)) -> dict[str, Training]:
        records = run_ranks(layout.ranks, on_rank, layout, mistake, optimizers, timeout=300)
        return {optimizer: assemble([record[optimizer] for record in records]) for optimizer in optimizers}

    return run


@pytest.fixture(scope="session")
def one_process(train, make_training, tiny_config):
    """Function of (variant, policy) -> {optimizer: Training} in float32 on one process.

    ``initial``: function of a variant -> its initial weights.
    """
    trained, initial = {}, {}

    def get(variant: str, trainable: str = "all") -> dict[str, Training]:
        if (variant, trainable) not in trained:
            trained[variant, trainable] = train(Layout(variant=variant, trainable=trainable))
        return trained[variant, trainable]

    def initial_weights(variant: str) -> dict[str, np.ndarray]:
        def on_rank():
            pipeline, _, _ = make_training(None, Layout(variant=variant).config(tiny_config, "sgd"))
            return {name: p.detach().numpy() for name, p in pipeline.model.named_parameters()}

        if variant not in initial:
            initial[variant] = run_ranks(1, on_rank)[0]
        return initial[variant]

    get.initial = initial_weights
    return get
