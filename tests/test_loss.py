"""Counts, sums and weights of the modalities."""

import numpy as np
import pytest
import torch

from megat2i.kernels import TokenLosses
from megat2i.loss import ModalityLoss, count_tokens, sum_by_modality


def modality(*codes):
    return torch.tensor(codes, dtype=torch.int8)


def test_counts():
    parts = [modality(0, 0, 1, -1), modality(2, 1, 1, 1)[None], modality(-1, -1)]
    assert count_tokens(parts).tolist() == [2, 4, 1]
    assert count_tokens([]).tolist() == [0, 0, 0] and count_tokens([]).dtype == torch.int64


def test_sums_by_modality():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    sums = sum_by_modality(values, modality(1, 0, 1, -1, 2))
    assert sums.tolist() == [2.0, 5.0, 16.0] and sums.dtype == torch.float64


def test_sums_are_exact_where_float32_is_not():
    values = torch.full((100_000,), 0.1)
    sums = sum_by_modality(values, torch.zeros(100_000, dtype=torch.int8))
    assert sums[0].item() == pytest.approx(100_000 * float(values[0]), rel=1e-12)
    one_by_one = np.add.accumulate(values.numpy())[-1]
    assert float(one_by_one) != pytest.approx(100_000 * float(values[0]), rel=1e-7)


def test_weights_sum_to_one_over_the_global_batch():
    loss = ModalityLoss((0.5, 2.0, 0.0))
    codes = modality(0, 0, 1, 2, -1)
    weight = loss.token_weight(codes, torch.tensor([2, 1, 1]))
    torch.testing.assert_close(weight, torch.tensor([0.5, 0.5, 2.0, 0.0, 0.0]) / 3)
    assert weight.dtype == torch.float32
    part = loss.token_weight(codes[:2][None], torch.tensor([2, 1, 1]))
    assert torch.equal(part[0], weight[:2]) and part.shape == (1, 2)


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="weight above 0"):
        ModalityLoss((1.0, 0.0, 0.0)).token_weight(modality(1, 1), torch.tensor([0, 2, 0]))


def test_the_objective_is_a_sum_times_the_scale():
    values = torch.tensor([1.0, 2.0, 3.5])
    losses = TokenLosses(values, *[torch.zeros(3)] * 4)
    assert ModalityLoss((1.0, 1.0, 1.0)).objective(losses, 2.0).item() == 13.0
