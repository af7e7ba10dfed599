"""FID, precision and recall of images against a reference, as a record that says how they were measured."""

import functools
import io
import itertools
import json
import platform
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megat2i.config import ConfigError
from megat2i.evaluate.fid import FeatureStatistics, bootstrap_deviation, frechet_distance
from megat2i.evaluate.image_folder import ImageFolder
from megat2i.evaluate.inception import load_inception
from megat2i.evaluate.precision_recall import NEIGHBOURS, precision_recall
from megat2i.evaluate.protocol import COCO_IMAGES, Protocol, find_protocol, prepare
from megat2i.evaluate.small_net import LABEL, small_features
from megat2i.files import DataFileError, write_file
from megat2i.progress import progress
from megat2i.tokenizers.vq_tokenizer import arithmetic

BATCH_SIZE = 64
REPLICATES = 100  # resamples behind an interval
ENOUGH = 2048  # images: with fewer, FID is mostly its own bias
PUBLISHED = "6726825d"  # how the published file's SHA-256 begins, by its name
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class FeatureNet:
    """A protocol with its feature net, ready to measure."""

    name: str
    protocol: Protocol
    net: Callable[[Tensor], Tensor]
    weights: dict | None  # name and SHA-256 of the weights' file
    batch_size: int

    @staticmethod
    def open(protocol: str, inception: Path | None, batch_size: int = BATCH_SIZE) -> "FeatureNet":
        """``inception``: weights, needed by all protocols but nano. Raises ConfigError and DataFileError."""
        found = find_protocol(protocol)
        if found.feature_net == "small":
            if inception is not None:
                raise ConfigError(f"protocol {protocol} has a feature net of its own: leave out {inception}")
            return FeatureNet(protocol, found, small_features, None, batch_size)
        if inception is None:
            problem = f"protocol {protocol} needs the weights of FID's Inception network, which are not part of megat2i"
            raise ConfigError(f"{problem}: pass pt_inception-2015-12-05-{PUBLISHED}.pth as --inception")
        net, sha256 = load_inception(inception)
        return FeatureNet(protocol, found, net.to(DEVICE), {"name": inception.name, "sha256": sha256}, batch_size)

    @property
    def identity(self) -> dict:
        """All that decides the features of an image."""
        settings = {"protocol": self.name} | asdict(self.protocol) | {"size": self.protocol.size}
        label = LABEL if self.weights is None else self.protocol.feature_net
        return settings | {"feature_net": label, "feature_net_file": self.weights}

    @torch.inference_mode()
    def features(self, prepared: Iterable[Tensor]) -> Tensor:
        """Features float32 [N, D], on the CPU, of images that ``prepare`` has made ready."""
        with arithmetic(torch.device(DEVICE), "ieee"):
            stacked = (torch.stack(batch).to(DEVICE) for batch in batches(prepared, self.batch_size))
            return torch.cat([self.net(batch).float().cpu() for batch in stacked])

    def of_folder(self, folder: Path) -> "Features":
        """The features of a folder of images."""
        images = ImageFolder.open(folder)
        prepared = images.prepared(functools.partial(prepare, protocol=self.protocol))
        values = self.features(progress(prepared, f"measuring {folder}", "images", len(images.names)))
        return Features(values, images.description())


@dataclass(frozen=True)
class Features:
    """Features float32 [N, D] and what they are of."""

    values: Tensor
    source: dict

    def save(self, path: Path, net: FeatureNet) -> None:
        """Write them as an .npz file, for ``load``."""
        content = io.BytesIO()
        about = json.dumps({"net": net.identity, "source": self.source})
        np.savez(content, features=self.values.numpy(), about=np.array(about))
        write_file(path, content.getbuffer())

    @staticmethod
    def load(path: Path, net: FeatureNet) -> "Features":
        """Raises DataFileError where the file is none of ``save``, or its features are not those of ``net``."""
        try:
            with np.load(path) as file:  # never unpickles
                about, values = json.loads(file["about"].item()), torch.from_numpy(file["features"])
            identity, source = about["net"], about["source"]
        except Exception as error:  # numpy and zipfile raise half a dozen kinds for damaged bytes
            remedy = "Pass a folder of images, or a file that --save-features wrote"
            raise DataFileError(path, f"not a file of features ({error!r})", remedy) from error
        for key, value in net.identity.items():
            if identity.get(key) != value:
                problem = f"its features have {key} {identity.get(key)!r}, asked for is {value!r}"
                raise DataFileError(path, problem, "Make it again with --save-features, from the images")
        return Features(values, source | {"features": str(path)})


def measure_fid(
    generated: Path,
    reference: Path,
    protocol: str,
    inception: Path | None = None,
    *,
    batch_size: int = BATCH_SIZE,
    replicates: int = REPLICATES,
    save_features: Path | None = None,
) -> dict:
    """FID, precision and recall of a folder of images, with all that is needed to measure them again.

    reference: a folder, or a file of features that ``save_features`` made of one. replicates: resamples behind the
    confidence interval, 0 for none. Raises ConfigError and DataFileError.
    """
    net = FeatureNet.open(protocol, inception, batch_size)
    drawn = net.of_folder(generated)
    true = Features.load(reference, net) if reference.is_file() else net.of_folder(reference)
    if save_features is not None:
        true.save(save_features, net)
    found = compare(drawn.values, true.values, net, replicates)
    if protocol.startswith("coco30k/") and len(drawn.values) != COCO_IMAGES:
        found["warnings"].append(f"{len(drawn.values):,} generated images: {protocol} means {COCO_IMAGES:,}")
    return {"measure": "fid"} | found | {"generated": drawn.source, "reference": true.source} | record()


def compare(generated: Tensor, reference: Tensor, net: FeatureNet, replicates: int) -> dict:
    """FID, precision and recall of features [N, D] against those of a reference, and what to beware of."""
    for features in (generated, reference):
        if len(features) <= NEIGHBOURS:
            raise ConfigError(f"{len(features)} images are too few to compare: at least {NEIGHBOURS + 1} are needed")
    generated, reference = generated.to(DEVICE), reference.to(DEVICE)
    drawn, true = FeatureStatistics.of(generated), FeatureStatistics.of(reference)
    fid = frechet_distance(drawn.mean, drawn.covariance, true.mean, true.covariance)
    precision, recall = precision_recall(generated, reference)
    warnings, enough = [], max(ENOUGH, generated.shape[1])
    for what, count in (("generated", drawn.count), ("reference", true.count)):
        if count < enough:
            problem = "FID is biased upwards: compare with the same number of images only"
            warnings.append(f"{count:,} {what} images are fewer than {enough:,}: {problem}")
    if net.weights and not net.weights["sha256"].startswith(PUBLISHED):
        problem = f"the SHA-256 of {net.weights['name']} does not begin with {PUBLISHED}, as that of the published file"
        warnings.append(f"{problem}: such a FID is not comparable with published ones")
    result = {"fid": fid, "interval": None, "precision": precision, "recall": recall, "neighbours": NEIGHBOURS}
    if replicates:
        deviation = bootstrap_deviation(generated, true, replicates)
        method = (
            f"fid -+ 1.96 standard deviations over {replicates} resamples, with replacement, of the generated images' "
            "features, against the fixed reference; chance alone, without the bias of few images"
        )
        low, high = max(0.0, fid - 1.96 * deviation), fid + 1.96 * deviation
        result["interval"] = {"level": 0.95, "low": low, "high": high, "method": method}
    return {**result, **net.identity, "warnings": warnings}


def record() -> dict:
    """Versions and the device, to be kept with every measure."""
    packages = ("megat2i", "torch", "numpy", "pillow")
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else f"cpu ({platform.machine()})",
    }


def batches(items: Iterable, size: int) -> Iterator[list]:
    """Lists of ``size`` items, the last one shorter. (itertools.batched is newer than Python 3.11.)"""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch
