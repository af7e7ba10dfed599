"""measure_fid: its numbers are those of its parts, and its record says how they came about."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from inception_weights import random_weights

from megat2i.config import ConfigError
from megat2i.evaluate import quality
from megat2i.evaluate.fid import FeatureStatistics, frechet_distance
from megat2i.evaluate.inception import load_inception
from megat2i.evaluate.precision_recall import precision_recall
from megat2i.evaluate.protocol import PROTOCOLS, prepare
from megat2i.evaluate.quality import FeatureNet, compare, measure_fid
from megat2i.evaluate.small_net import small_features
from megat2i.files import DataFileError


@pytest.fixture(scope="module")
def folders(drawings, tmp_path_factory):
    """(60 generated pictures, 70 reference pictures)."""
    root = tmp_path_factory.mktemp("folders")
    parts = root / "generated", root / "reference"
    for folder, pictures in zip(parts, (drawings[:60], drawings[60:130]), strict=True):
        folder.mkdir()
        for number, picture in enumerate(pictures):
            picture.save(folder / f"{number:03d}.png")
    return parts


@pytest.fixture(scope="module")
def nano(folders):
    return measure_fid(*folders, "nano")


def features(pictures, net=small_features, protocol="nano"):
    with torch.no_grad():
        return net(torch.stack([prepare(picture, PROTOCOLS[protocol]) for picture in pictures]))


def expected_fid(first: torch.Tensor, second: torch.Tensor) -> float:
    parts = [FeatureStatistics.of(values) for values in (first, second)]
    return frechet_distance(*(value for part in parts for value in (part.mean, part.covariance)))


def test_the_numbers_are_those_of_the_parts(drawings, nano):
    parts = features(drawings[:60]), features(drawings[60:130])
    assert nano["fid"] == pytest.approx(expected_fid(*parts), abs=1e-4)  # features are kept in float32
    assert (nano["precision"], nano["recall"]) == pytest.approx(precision_recall(*parts))
    interval = nano["interval"]
    assert interval["low"] < nano["fid"] < interval["high"] and "100 resamples" in interval["method"]


def test_the_record_says_how(folders, nano):
    assert json.loads(json.dumps(nano, allow_nan=False)) == nano
    assert nano["feature_net"] == "small (not Inception: not comparable with published FID)"
    assert nano["protocol"] == "nano" and nano["crop"] == "none" and "Pillow" in nano["resize"]
    assert (nano["generated"]["images"], nano["reference"]["images"]) == (60, 70)
    assert {"torch", "pillow", "megat2i"} <= nano["versions"].keys()
    assert [warning.split(" are fewer")[0] for warning in nano["warnings"]] == [
        "60 generated images",
        "70 reference images",
    ]
    assert "coco" not in json.dumps(nano).lower()


def test_the_order_and_the_batches_do_not_matter(folders, nano):
    again = measure_fid(*folders, "nano", batch_size=7)
    assert again["fid"] == pytest.approx(nano["fid"], rel=1e-9) and again["interval"] == nano["interval"]


def test_a_reference_may_be_saved_features(folders, nano, tmp_path):
    file = tmp_path / "reference.npz"
    measure_fid(*folders, "nano", replicates=0, save_features=file)
    from_file = measure_fid(folders[0], file, "nano")
    assert from_file["fid"] == nano["fid"] and from_file["interval"] == nano["interval"]
    assert from_file["reference"]["sha256"] == nano["reference"]["sha256"]
    assert from_file["reference"]["features"] == str(file)


def test_features_of_another_protocol_or_no_features_are_refused(folders, tmp_path, monkeypatch):
    file = tmp_path / "reference.npz"
    measure_fid(*folders, "nano", replicates=0, save_features=file)
    monkeypatch.setitem(PROTOCOLS, "nano", PROTOCOLS["nano"].__class__("small", "none", None, "other resize", 127.5))
    with pytest.raises(DataFileError, match="features have resize 'bicubic.* asked for is 'other resize'"):
        measure_fid(folders[0], file, "nano")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataFileError, match="not a file of features"):
        measure_fid(folders[0], file, "nano")
    np.savez(file, features=np.array([object()]), about=np.array("{}"))
    with pytest.raises(DataFileError, match="not a file of features.*allow_pickle=False"):
        measure_fid(folders[0], file, "nano")


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(random_weights(), file)
    return file


def test_inception_by_protocol(folders, drawings, inception_file, tmp_path):
    for name in ("000.png", "001.png", "002.png", "003.png"):
        (tmp_path / name).write_bytes((folders[0] / name).read_bytes())
    net = FeatureNet.open("coco30k/gigagan", inception_file, batch_size=3)
    found = net.of_folder(tmp_path).values
    expected = features(drawings[:4], load_inception(inception_file)[0], "coco30k/gigagan")
    assert found.shape == (4, 2048) and torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    # A few of the features: all of them take seconds.
    record = compare(found[:, :20], found[:, :20] + 1, net, replicates=0)
    assert record["fid"] == pytest.approx(20) and record["interval"] is None
    assert record["feature_net"] == "inception" and record["lanczos_to"] == 256
    assert record["feature_net_file"]["sha256"] == hashlib.sha256(inception_file.read_bytes()).hexdigest()
    problem = "does not begin with 6726825d"
    assert problem in " ".join(record["warnings"]), "random weights pass for the published ones"
    weights = net.weights | {"sha256": "6726825d" + net.weights["sha256"][8:]}
    record = compare(found[:, :20], found[:, :20], replace(net, weights=weights), replicates=0)
    assert problem not in " ".join(record["warnings"])


def test_coco_is_30000_images(folders, monkeypatch):
    monkeypatch.setitem(PROTOCOLS, "coco30k/small", PROTOCOLS["nano"])
    warnings = measure_fid(*folders, "coco30k/small", replicates=0)["warnings"]
    assert "60 generated images: coco30k/small means 30,000" in warnings


@pytest.mark.full
def test_all_of_inception(folders, inception_file, tmp_path):
    found = measure_fid(*folders, "pytorch-fid", inception_file, replicates=0, save_features=tmp_path / "all.npz")
    again = measure_fid(folders[0], tmp_path / "all.npz", "pytorch-fid", inception_file, replicates=2)
    assert again["fid"] == found["fid"] > 0 and again["interval"]["high"] > found["fid"]


def test_wrong_settings_are_refused(folders, inception_file, tmp_path, drawings):
    with pytest.raises(ConfigError, match="pass pt_inception-2015-12-05-6726825d.pth as --inception"):
        measure_fid(*folders, "clean-fid")
    with pytest.raises(ConfigError, match="nano has a feature net of its own"):
        measure_fid(*folders, "nano", inception_file)
    with pytest.raises(ConfigError, match="is none of"):
        measure_fid(*folders, "fid")
    for number in range(3):
        drawings[number].save(tmp_path / f"{number}.png")
    with pytest.raises(ConfigError, match="3 images are too few"):
        measure_fid(tmp_path, folders[1], "nano")


def test_batches():
    assert list(quality.batches(range(5), 2)) == [[0, 1], [2, 3], [4]]
