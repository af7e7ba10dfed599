"""The other implementation that measures are compared with, and real pictures."""

import importlib.util
import os
import random
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def torch_fidelity():
    """torch-fidelity's own FID, precision and recall, Inception and resize. Absent: skipped, failed where CI is set.

    It imports torchvision, which has no build for every torch and of which none of this uses anything: where it is
    absent, empty modules take its place during the import.
    """
    if importlib.util.find_spec("torch_fidelity") is None:
        problem = "torch-fidelity is absent: pip install --no-deps -c constraints.txt torch-fidelity"
        pytest.fail(problem) if os.environ.get("CI") else pytest.skip(problem)
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("torchvision") is None:
            for name in ("torchvision", "torchvision.datasets", "torchvision.transforms.functional"):
                patch.setitem(sys.modules, name, types.ModuleType(name))
            patch.setitem(sys.modules, "torchvision.transforms", types.ModuleType("torchvision.transforms"))
            sys.modules["torchvision.transforms"].functional = sys.modules["torchvision.transforms.functional"]
            sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
            for name in ("CIFAR10", "CIFAR100", "STL10"):
                setattr(sys.modules["torchvision.datasets"], name, type(name, (), {}))
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
        from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
        from torch_fidelity.metric_prc import calculate_precision_recall_full

    def fid(features, reference) -> float:
        statistics = [fid_features_to_statistics(values) for values in (features, reference)]
        return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]

    return SimpleNamespace(
        fid=fid,
        precision_recall=calculate_precision_recall_full,
        Inception=FeatureExtractorInceptionV3,
        resize=interpolate_bilinear_2d_like_tensorflow1x,
    )


@pytest.fixture(scope="session")
def drawings() -> list[Image.Image]:
    """300 OpenMoji pictures of 48 x 48 pixels, in a fixed random order."""
    from megat2i.data.openmoji import captioned_images, render

    chosen = random.Random(0).sample(captioned_images("train"), 300)
    return [render(drawing.characters, 48) for drawing in chosen]


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A picture of 53 x 40 pixels with smooth areas, edges and noise."""
    rows, columns = np.mgrid[:40, :53]
    picture = np.stack([rows * 6, columns * 4, 255 * ((rows // 7 + columns // 9) % 2)], axis=-1)
    noise = np.random.default_rng(0).integers(-20, 20, picture.shape)
    return Image.fromarray((picture + noise).clip(0, 255).astype(np.uint8))
