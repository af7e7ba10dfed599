"""Preprocessing with a network: the same codes as by hand, what the manifest says, lower precision, codebook use."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from captioned_images import OUTPUTS, make_encoding, output_bytes, picture, run, write_images
from PIL import Image
from small_networks import SMALL, random_weights

from megat2i.data.encode_part import Encoding, code_agreement
from megat2i.data.indexed import IndexedDataset
from megat2i.data.manifest import Manifest
from megat2i.data.sources import find_parts
from megat2i.files import DataFileError
from megat2i.tokenizers.image import load_image_tokenizer
from megat2i.tokenizers.movqgan import MoVQGAN, prepare


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A published file, as far as the tool can tell: raw weights of a small network."""
    path = tmp_path_factory.mktemp("published") / "movqgan_small.ckpt"
    torch.save(random_weights(MoVQGAN, MoVQGAN.architecture(SMALL)), path)
    return path


@pytest.fixture(scope="module")
def encoding(checkpoint, tmp_path_factory) -> Encoding:
    folder = tmp_path_factory.mktemp("tokenizers")
    MoVQGAN.from_checkpoint(checkpoint, image_size=16).save(folder / "movqgan.safetensors")
    return replace(make_encoding(folder), image_tokenizer=folder / "movqgan.safetensors", crop="movq")


def lower(encoding: Encoding, checkpoint: Path, precision: str) -> Encoding:
    path = encoding.image_tokenizer.with_name(f"{precision}.safetensors")
    MoVQGAN.from_checkpoint(checkpoint, image_size=16, encoder_precision=precision).save(path)
    return replace(encoding, image_tokenizer=path)


def test_codes_are_those_of_the_prepared_images(tmp_path, encoding, monkeypatch):
    monkeypatch.setattr("megat2i.data.sources.BLOCK", 4)
    source = write_images(tmp_path / "in", 10, (41, 36))
    for workers in (1, 2):
        run(source, tmp_path / str(workers) / "train", encoding, workers)
    assert output_bytes(tmp_path / "1" / "train") == output_bytes(tmp_path / "2" / "train")
    store, network = IndexedDataset(tmp_path / "1" / "train"), load_image_tokenizer(encoding.image_tokenizer)
    expected = network.encode(torch.stack([prepare(picture(number, (41, 36)), 16) for number in range(10)])).numpy()
    found = np.stack([store.sequence(index) for index in range(1, 20, 2)])
    assert np.array_equal(found, expected) and len(np.unique(found)) > 10
    run(source, tmp_path / "center" / "train", replace(encoding, crop="center"))
    other = IndexedDataset(tmp_path / "center" / "train")
    assert not np.array_equal(np.stack([other.sequence(index) for index in range(1, 20, 2)]), expected)
    manifest = Manifest.read(tmp_path / "1" / "train").image
    assert (manifest.kind, manifest.crop, manifest.encoder_precision) == ("movqgan", "movq", "float32")
    assert (manifest.codebook_size, manifest.grid, manifest.sha256) == (48, (8, 8), network.sha256)


def test_large_jpegs_are_prepared_from_all_their_pixels(tmp_path, encoding):
    """Pillow would decode this one at an eighth of its size, as the other crops let it."""
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8))
    (tmp_path / "in").mkdir()
    smooth.resize((400, 300), Image.Resampling.BICUBIC).save(tmp_path / "in" / "a.jpg", quality=95)
    (tmp_path / "in" / "a.txt").write_text("a large picture")
    run(tmp_path / "in", tmp_path / "out" / "train", encoding)
    network, whole = load_image_tokenizer(encoding.image_tokenizer), Image.open(tmp_path / "in" / "a.jpg")
    found = IndexedDataset(tmp_path / "out" / "train").sequence(1)
    assert np.array_equal(found, network.encode(prepare(whole, 16)[None])[0].numpy())
    reduced = Image.open(tmp_path / "in" / "a.jpg")
    reduced.draft(None, (32, 32))
    assert reduced.size == (50, 38)
    assert not np.array_equal(found, network.encode(prepare(reduced, 16)[None])[0].numpy())


def test_codebook_use_is_counted_over_new_and_kept_parts(tmp_path, encoding, monkeypatch):
    monkeypatch.setattr("megat2i.data.sources.BLOCK", 4)
    source, prefix = write_images(tmp_path / "in", 10), tmp_path / "out" / "train"
    summary = run(source, prefix, encoding)
    store = IndexedDataset(prefix)
    counts = np.bincount(np.concatenate([store.sequence(i) for i in range(1, 20, 2)]), minlength=48)
    assert np.array_equal(summary.codebook.counts, counts) and counts.sum() == 640
    share = counts[counts > 0] / 640
    report = json.loads(Path(f"{prefix}.codebook.json").read_text())
    assert report["used"] == summary.codebook.used == len(share) < 48
    assert report["perplexity"] == pytest.approx(2 ** -(share * np.log2(share)).sum(), abs=1e-3)
    assert (report["codebook_size"], report["counts"]) == (48, counts.tolist())

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    before = output_bytes(prefix)
    with monkeypatch.context() as patch, pytest.raises(Stop):  # after all parts, before they are merged
        patch.setattr("megat2i.data.preprocess.write_dataset", stop)
        run(source, prefix, encoding, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr("megat2i.data.encode_part._write_part", stop)  # all of them are kept
        again = run(source, prefix, encoding, overwrite=True)
    assert np.array_equal(again.codebook.counts, counts) and output_bytes(prefix) == before


def test_lower_precision_is_compared_with_float32_and_recorded(tmp_path, encoding, checkpoint):
    source = write_images(tmp_path / "in", 20)
    parts = find_parts([str(source)], "train")
    assert code_agreement(parts, encoding) is None
    low = lower(encoding, checkpoint, "bfloat16")
    images, share = code_agreement(parts, low)
    assert images == 20 and 0.8 < share < 1
    run(source, tmp_path / "low" / "train", low)
    run(source, tmp_path / "exact" / "train", encoding)
    assert Manifest.read(tmp_path / "low" / "train").image.encoder_precision == "bfloat16"
    codes = [
        np.concatenate([store.sequence(i) for i in range(1, 40, 2)])
        for store in (IndexedDataset(tmp_path / name / "train") for name in ("low", "exact"))
    ]
    assert np.mean(codes[0] == codes[1]) == pytest.approx(share)  # here the sample is all images
    (tmp_path / "in" / "0000.png").write_bytes(b"broken")
    assert code_agreement(parts, low)[0] == 19
    assert code_agreement([], low) is None
    with pytest.raises(DataFileError, match="tf32, which only CUDA devices compute"):
        run(source, tmp_path / "tf32" / "train", lower(encoding, checkpoint, "tf32"))


def test_the_sample_for_the_comparison_is_spread_over_the_parts(tmp_path, encoding, checkpoint, monkeypatch):
    monkeypatch.setattr("megat2i.data.sources.BLOCK", 4)
    monkeypatch.setattr("megat2i.data.encode_part.AGREEMENT_IMAGES", {"cpu": 6})
    monkeypatch.setattr("megat2i.data.encode_part.AGREEMENT_PARTS", 3)
    parts = find_parts([str(write_images(tmp_path / "in", 24))], "train")
    read = []
    real = type(parts[0]).samples

    def samples(part):
        for sample in real(part):
            read.append(sample.name)
            yield sample

    monkeypatch.setattr(type(parts[0]), "samples", samples)
    images, _ = code_agreement(parts, lower(encoding, checkpoint, "bfloat16"))
    assert images == 6 and [name.split(":")[0] for name in read] == [f"line {n}" for n in (1, 2, 9, 10, 17, 18)]


# The command line


def test_the_tool_from_a_published_file_to_a_second_dataset(tmp_path, checkpoint, command_line, capsys):
    source, out = write_images(tmp_path / "in", 6), tmp_path / "out"
    common = ("--input", source, "--workers", 1)
    network = ("--image-tokenizer", "movqgan", "--image-checkpoint", checkpoint)
    command_line(*common, "--output-prefix", out / "train", "--train-text-tokenizer", 300, *network,
                 "--image-size", 32, "--encoder-precision", "bfloat16")  # fmt: skip
    said = capsys.readouterr().out
    assert "of the codes of 6 images are those of float32" in said and "of 48 codes occur, perplexity" in said
    names = [f"train{suffix}" for suffix in OUTPUTS] + ["text_tokenizer.json", "image_tokenizer.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    files = ("--text-tokenizer", out / "text_tokenizer.json", "--image-tokenizer", out / "image_tokenizer.safetensors")
    command_line(*common, "--output-prefix", out / "valid", *files)
    images = [Manifest.read(out / name).image for name in ("train", "valid")]
    assert images[0] == images[1] and (images[0].crop, images[0].image_size) == ("movq", 32)
    assert images[0].encoder_precision == "bfloat16"
    assert (out / "train.bin").read_bytes() == (out / "valid.bin").read_bytes()
    with pytest.raises(SystemExit, match="there is another tokenizer, and datasets may depend on it"):
        command_line(*common, "--output-prefix", out / "more", *files[:2], *network)


def test_tasks_of_an_array_write_their_network_once(tmp_path, encoding, checkpoint, command_line, monkeypatch):
    """A rename would put the file of a slower task in the place of that which the others have open."""
    out = tmp_path / "out"
    out.mkdir()
    strays = [out / f"image_tokenizer.safetensors.{name}.tmp" for name in ("old", "new")]
    for stray in strays:
        stray.touch()
    os.utime(strays[0], times=(0, 0))
    real, renamed = os.replace, []
    monkeypatch.setattr(os, "replace", lambda *names: (renamed.append(Path(names[1])), real(*names)))
    task = ("--input", write_images(tmp_path / "in", 2), "--workers", 1, "--shard-index", 0, "--num-shards", 1)
    network = ("--image-tokenizer", "movqgan", "--image-checkpoint", checkpoint, "--image-size", 32)
    command_line(*task, "--output-prefix", out / "train", "--text-tokenizer", encoding.text_tokenizer, *network)
    assert (out / "image_tokenizer.safetensors").exists() and out / "image_tokenizer.safetensors" not in renamed
    assert [stray.exists() for stray in strays] == [False, True]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--image-tokenizer", "movqgan"], "--image-tokenizer movqgan needs --image-checkpoint"),
        (["--image-checkpoint", "{file}"], "--image-checkpoint belongs to --image-tokenizer movqgan or llamagen-vq"),
        (["--encoder-precision", "bfloat16"], "--encoder-precision belongs to"),
        (["--ema"], "--ema belongs to"),
        (["--crop", "movq"], "--crop movq belongs to networks"),
        (["{network}", "--codebook-size", 64], "--codebook-size belongs to --image-tokenizer patch"),
        (["{network}", "--image-size", 33], "image size 33 is not a multiple of 2"),
        (["{network}", "--encoder-precision", "tf32"], "tf32, which only CUDA devices compute"),
        (["--image-tokenizer", "llamagen-vq", "--image-checkpoint", "{file}"], "not a llamagen-vq model"),
        (["{network}", "--ema"], "it has no averaged weights"),
        (["--image-tokenizer", "movqgan", "--image-checkpoint", "{cut}"], "a truncated, damaged or foreign file"),
        (["--image-tokenizer", "{file}"], "not an image tokenizer's file"),
    ],
)
def test_wrong_arguments_are_one_sentence_before_any_work(
    tmp_path, checkpoint, command_line, capsys, arguments, problem
):
    (tmp_path / "cut.ckpt").write_bytes(checkpoint.read_bytes()[:-100])
    names = {"{file}": [checkpoint], "{cut}": [tmp_path / "cut.ckpt"]}
    names["{network}"] = ["--image-tokenizer", "movqgan", "--image-checkpoint", checkpoint]
    arguments = [word for argument in arguments for word in names.get(argument, [argument])]
    source = write_images(tmp_path / "in", 1)
    with pytest.raises(SystemExit) as end:
        command_line("--input", source, "--output-prefix", tmp_path / "out" / "train",
                     "--train-text-tokenizer", 300, *arguments)  # fmt: skip
    said = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    assert problem in said and "\n" not in said
    assert not list(tmp_path.glob("out/train*"))
