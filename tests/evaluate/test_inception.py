"""FID's Inception: torch-fidelity's features with the same weights, and nothing else taken for its file."""

import pytest
import torch
from inception_weights import random_weights
from torch.nn import functional as F

from megat2i.data.images import to_tensor
from megat2i.evaluate import inception
from megat2i.evaluate.inception import load_inception
from megat2i.evaluate.protocol import PROTOCOLS, prepare
from megat2i.files import DataFileError


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return random_weights()


@pytest.fixture(scope="module")
def file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(weights, path)
    return path


@pytest.fixture(scope="module")
def peers_features(torch_fidelity, file, photo, drawings):
    """(prepared images [2, 3, 299, 299], torch-fidelity's features of them [2, 2048])."""
    images = [photo, drawings[0].resize((320, 310))]
    with pytest.MonkeyPatch.context() as patch:  # no time for random weights
        for layer in (torch.nn.Conv2d, torch.nn.Linear):
            patch.setattr(layer, "reset_parameters", lambda self: None)
        peer = torch_fidelity.Inception("peer", ["2048"], feature_extractor_weights_path=file)
    features = torch.cat([peer(to_tensor(image)[None])[0] for image in images])
    return torch.stack([prepare(image, PROTOCOLS["torch-fidelity"]) for image in images]), features


@torch.no_grad()
def test_the_features_of_torch_fidelity(file, peers_features):
    prepared, expected = peers_features
    net, sha256 = load_inception(file)
    found = net(prepared)
    assert found.shape == (2, 2048) and len(sha256) == 64
    assert expected.std() > 0.1 and (expected[0] - expected[1]).abs().mean() > 0.05, "features that say something"
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


MISTAKES = {
    "average pools that count the padding": ("average", lambda x: F.avg_pool2d(x, 3, stride=1, padding=1)),
    "an average in the last block": ("maximum", inception.POOLS["average"]),
    "a maximum in the blocks before": ("average", inception.POOLS["maximum"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@torch.no_grad()
def test_the_comparison_notices(file, peers_features, monkeypatch, mistake):
    name, pool = MISTAKES[mistake]
    monkeypatch.setitem(inception.POOLS, name, pool)
    prepared, expected = peers_features
    assert (load_inception(file)[0](prepared[:1]) - expected[:1]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.pop("Mixed_6c.branch7x7_2.bn.running_var"), "branch7x7_2.bn.running_var is missing"),
        (lambda weights: weights.update({"AuxLogits.fc.weight": torch.ones(3)}), "AuxLogits.fc.weight is unknown"),
        (lambda weights: weights.update({"fc.weight": torch.ones(1000, 2048)}), "fc.weight is [1000, 2048]"),
        (lambda weights: weights["fc.bias"].fill_(float("inf")), "fc.bias holds values that are not finite"),
    ],
)
def test_another_file_is_refused(weights, tmp_path, change, words):
    changed = dict(weights, **{"fc.bias": weights["fc.bias"].clone()})
    change(changed)
    torch.save(changed, tmp_path / "other.pth")
    with pytest.raises(DataFileError) as refused:
        load_inception(tmp_path / "other.pth")
    assert words in str(refused.value) and "other.pth: not the Inception network of FID" in str(refused.value)


def test_a_file_with_code_in_it_is_refused(tmp_path):
    torch.save({"net": torch.nn.Linear(2, 2)}, tmp_path / "code.pth")
    with pytest.raises(DataFileError, match="could run any program"):
        load_inception(tmp_path / "code.pth")
