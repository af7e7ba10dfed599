"""Precision and recall: by hand on a line, torch-fidelity's on random vectors, and in blocks as in one."""

import pytest
import torch

from megat2i.evaluate import precision_recall as module
from megat2i.evaluate.precision_recall import precision_recall


def test_vectors_on_a_line():
    reference = torch.tensor([0.0, 1.0, 2.0, 3.0])[:, None]  # radii 3, 2, 2, 3: the manifold is -3 .. 6
    generated = torch.tensor([-3.5, -3.0, 6.0, 100.0])[:, None]  # radii 103.5, 103, 94, 106
    assert precision_recall(generated, reference) == (0.5, 1.0)
    assert precision_recall(reference, generated) == (1.0, 0.5)


@pytest.mark.parametrize("distances", [2**25, 700], ids=["whole", "blocks"])
def test_the_same_as_torch_fidelity(torch_fidelity, monkeypatch, distances):
    monkeypatch.setattr(module, "DISTANCES", distances)
    generator = torch.Generator().manual_seed(0)
    generated = torch.randn(211, 6, generator=generator)
    reference = torch.randn(190, 6, generator=generator) * 1.3 + 0.4
    expected = torch_fidelity.precision_recall(generated, reference)
    found = precision_recall(generated, reference)
    assert found == pytest.approx(expected, abs=1e-6)  # their mean is float32
    assert 0.1 < found[1] < found[0] < 0.99, "a case that tells the two apart"


def test_copies_of_few_images_have_precision_without_recall():
    generator = torch.Generator().manual_seed(1)
    reference = torch.randn(400, 4, generator=generator)
    copies = reference[:8].repeat(50, 1) + 1e-3 * torch.randn(400, 4, generator=generator)
    precision, recall = precision_recall(copies, reference)
    assert precision > 0.95 and recall < 0.1


def test_too_few_are_refused():
    with pytest.raises(ValueError, match="more than 3"):
        precision_recall(torch.rand(3, 2), torch.rand(9, 2))
