"""Weight files of networks: every published form is read, nothing in them is executed, what is wrong is one error."""

import io
import json
import os
import re
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch
from small_networks import SMALL, random_images, random_weights, small

from megat2i.files import DataFileError
from megat2i.tokenizers.image import load_image_tokenizer
from megat2i.tokenizers.movqgan import MoVQGAN
from megat2i.weights_file import read_checkpoint

IMAGES = random_images(2, 16, 16)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return random_weights(MoVQGAN, MoVQGAN.architecture(SMALL))


@pytest.fixture(scope="module")
def averages() -> dict[str, torch.Tensor]:
    return random_weights(MoVQGAN, MoVQGAN.architecture(SMALL), scale=0.9)


@pytest.fixture(scope="module")
def codes(tensors, tmp_path_factory) -> torch.Tensor:
    path = tmp_path_factory.mktemp("codes") / "x.ckpt"
    torch.save(tensors, path)
    return MoVQGAN.from_checkpoint(path, SMALL).encode(IMAGES)


def lightning(tensors, averages) -> dict:
    """A training checkpoint: wrapped, with its losses, its optimizer, and averages under names without dots."""
    state = dict(tensors)
    state["loss.discriminator.main.0.weight"] = torch.ones(3)
    for name, value in averages.items():
        part, rest = name.split(".", 1)
        state[f"ema_{part}." + rest.replace(".", "")] = value
    for part in {name.split(".")[0] for name in tensors}:
        state[f"ema_{part}.decay"] = torch.tensor(0.9999)
        state[f"ema_{part}.num_updates"] = torch.tensor(-1, dtype=torch.int)
    return {"epoch": 3, "state_dict": state, "optimizer_states": [{"state": {0: {"step": 1}}}], "lr_schedulers": []}


@pytest.mark.parametrize("form", ["zip", "legacy", "ordered", "safetensors", "half", "lightning"])
def test_every_form_gives_the_same_tokenizer(tmp_path, tensors, averages, codes, form):
    path = tmp_path / "model.ckpt"
    if form == "safetensors":
        safetensors.torch.save_file(tensors, path)  # known by its content, not by its name
    elif form == "half":
        halves = {name: value.bfloat16() for name, value in tensors.items()}
        torch.save(halves, path)
        model = MoVQGAN.from_checkpoint(path, SMALL)
        assert all(torch.equal(value, halves[name].float()) for name, value in model.state_dict().items())
        return
    else:
        content = {"ordered": OrderedDict(tensors), "lightning": lightning(tensors, averages)}.get(form, tensors)
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    for config in (SMALL, None):  # None: the sizes are read from the file
        assert torch.equal(MoVQGAN.from_checkpoint(path, config).encode(IMAGES), codes)


def test_averaged_weights_are_taken_where_asked_for(tmp_path, tensors, averages, codes):
    path = tmp_path / "last.ckpt"
    torch.save(lightning(tensors, averages), path)
    model = MoVQGAN.from_checkpoint(path, SMALL, ema=True)
    assert all(torch.equal(value, averages[name]) for name, value in model.state_dict().items())
    assert not torch.equal(model.encode(IMAGES), codes)
    torch.save(tensors, path)
    with pytest.raises(DataFileError, match="no averaged weights: ema_.* is missing"):
        MoVQGAN.from_checkpoint(path, SMALL, ema=True)


def test_the_file_may_go_after_loading(tmp_path, tensors, codes):
    path = tmp_path / "x.ckpt"
    torch.save(tensors, path)
    model = MoVQGAN.from_checkpoint(path, SMALL)
    path.write_bytes(b"")  # a mapped tensor would now end the process
    assert torch.equal(model.encode(IMAGES), codes)


class Attack:
    """An object whose unpickling makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["alone", "beside", "inside"])
def test_nothing_in_a_file_is_executed(tmp_path, tensors, place, legacy):
    path, trace = tmp_path / "x.ckpt", tmp_path / "executed"
    attack = Attack(trace)
    content = {
        "alone": attack,
        "beside": {"state_dict": tensors, "callbacks": attack},
        "inside": {**tensors, "a": attack},
    }
    torch.save(content[place], path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        DataFileError, match=r"refused: besides tensors it holds \S*mkdir.*Save its state_dict"
    ) as error:
        MoVQGAN.from_checkpoint(path, SMALL)
    assert not trace.exists() and "weights_only" not in str(error.value) and "\n" not in str(error.value)
    torch.load(path, weights_only=False)  # the attack itself is real
    assert trace.exists()


def damaged(tensors) -> dict[str, bytes]:
    def saved(content, **options):
        buffer = io.BytesIO()
        torch.save(content, buffer, **options)
        return buffer.getvalue()

    whole, legacy = saved(tensors), saved(tensors, _use_new_zipfile_serialization=False)
    tensor_file = safetensors.torch.save(tensors)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("readme.txt", "a zip file of something else")
    return {
        "empty": b"",
        "short": b"PK",
        "cut zip": whole[: len(whole) // 2],
        "cut at the end": whole[:-1],
        "cut legacy": legacy[: len(legacy) // 2],
        "cut safetensors": tensor_file[: len(tensor_file) // 2],
        "cut header": tensor_file[:200],
        "picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1083000000\n",
        "page": b"<!DOCTYPE html><html><head><title>404</title></head></html>",
        "other zip": archive.getvalue(),
        "list": saved([1, 2, 3]),
        "number": saved({"state_dict": {"encoder.conv_in.weight": 3}}),
        "nothing": saved({}),
        "optimizer": saved({"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]}),
    }


def test_damaged_and_foreign_files_are_one_error(tmp_path, tensors):
    for name, content in damaged(tensors).items():
        path = tmp_path / f"{name}.ckpt"
        path.write_bytes(content)
        with pytest.raises(DataFileError) as error:
            MoVQGAN.from_checkpoint(path, SMALL)
        message = str(error.value)
        assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 600, (name, message)
    with pytest.raises(DataFileError, match="No such file"):
        MoVQGAN.from_checkpoint(tmp_path / "none.ckpt", SMALL)
    with pytest.raises(DataFileError, match="Is a directory"):
        MoVQGAN.from_checkpoint(tmp_path, SMALL)


def changed(tensors, **values):
    return {name: values.get(name.replace(".", "_"), value) for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "decoder.conv_out.bias"}, "decoder.conv_out.bias is missing"),
        (lambda t: {k: v for k, v in t.items() if "decoder" not in k}, r"decoder.* is missing \(and \d+ more"),
        (lambda t: {**t, "decoder.extra": torch.ones(1)}, "decoder.extra is unknown"),
        (lambda t: {k: v for k, v in t.items() if "quantize" not in k}, "quantize.embedding.weight is missing"),
        (lambda t: {k: v for k, v in t.items() if "down" not in k}, "model: the shapes .*blocks is 0"),
        (lambda t: changed(t, quantize_embedding_weight=torch.ones(48)), "not a movqgan model: the shapes"),
        (lambda t: changed(t, encoder_conv_in_weight=torch.tensor(1.0)), "not a movqgan model: the shapes"),
        (lambda t: changed(t, quantize_embedding_weight=torch.ones(64, 4)), r"\[64, 4\], expected \[48, 4\]"),
        (lambda t: changed(t, quantize_embedding_weight=torch.ones(48, 5)), r"\[48, 5\], expected \[48, 4\]"),
        (
            lambda t: changed(t, quant_conv_bias=torch.tensor([1, 2, 3, torch.nan])),
            "quant_conv.bias holds .* not finite",
        ),
        (lambda t: changed(t, quant_conv_bias=torch.ones(4, dtype=torch.int64)), "quant_conv.bias holds torch.int64"),
        (
            lambda t: {k.replace("encoder.", "module.encoder."): v for k, v in t.items()},
            "encoder.conv_in.weight is missing",
        ),
    ],
)
def test_another_model_is_one_error(tmp_path, tensors, make, problem):
    torch.save(make(tensors), tmp_path / "x.ckpt")
    with pytest.raises(DataFileError, match=problem):
        MoVQGAN.from_checkpoint(tmp_path / "x.ckpt", SMALL)


def test_the_published_size_that_a_file_has_is_named(tmp_path):
    with torch.device("meta"):
        state = MoVQGAN(MoVQGAN.sizes["67M"]).state_dict()
    torch.save(
        {name: torch.zeros(value.shape, dtype=torch.uint8) for name, value in state.items()}, tmp_path / "x.ckpt"
    )
    with pytest.raises(
        DataFileError, match=r"not a movqgan 270M model: .* \(and \d+ more .*Its sizes are those of 67M"
    ):
        MoVQGAN.from_checkpoint(tmp_path / "x.ckpt", "270M")


def test_mutated_files_never_crash_and_never_execute(tmp_path, tensors):
    """Bytes changed near the parts that are parsed: an error, or tensors; never another exception."""
    few = {name: tensors[name] for name in list(tensors)[:3]}
    buffer = io.BytesIO()
    torch.save(few, buffer)
    random, path = np.random.default_rng(0), tmp_path / "x.ckpt"
    with zipfile.ZipFile(buffer) as archive:
        names = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in names if name.endswith("data.pkl"))
    errors = 0
    for _ in range(400):
        content = bytearray(names[pickled])
        for _ in range(random.integers(1, 4)):
            content[random.integers(len(content))] = random.integers(256)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, value in names.items():
                archive.writestr(name, bytes(content) if name == pickled else value)
        try:
            read_checkpoint(path)
        except DataFileError as error:
            errors += 1
            assert "\n" not in str(error)
    assert errors > 100


# The file that we write


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_our_own_file_says_all_about_the_tokenizer(tmp_path, tensors, precision):
    torch.save(tensors, tmp_path / "published.ckpt")
    options = {"image_size": 32, "encoder_precision": precision}
    made = MoVQGAN.from_checkpoint(tmp_path / "published.ckpt", SMALL, **options)
    path = tmp_path / "image_tokenizer.safetensors"
    made.save(path)
    opened = load_image_tokenizer(path)
    assert isinstance(opened, MoVQGAN) and opened.kind == "movqgan" and opened.crop == "movq"
    assert (opened.image_size, opened.grid, opened.encoder_precision) == (32, (16, 16), precision)
    assert opened.sha256 == made.sha256 and re.fullmatch("[0-9a-f]{64}", opened.sha256)
    assert opened.checkpoint == {"name": "published.ckpt", "sha256": read_checkpoint(tmp_path / "published.ckpt")[1],
                                 "ema": False}  # fmt: skip
    codes = made.encode(IMAGES)
    assert torch.equal(opened.encode(IMAGES), codes) and torch.equal(opened.decode(codes), made.decode(codes))
    assert torch.equal(MoVQGAN.from_checkpoint(path, SMALL, **options).encode(IMAGES), codes)
    opened.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    other = {"float32": "bfloat16", "bfloat16": "float32"}[precision]
    assert MoVQGAN.from_checkpoint(path, SMALL, image_size=32, encoder_precision=other).sha256 != made.sha256


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"image_size": 15, "encoder_precision": "float32"}, "image size 15 is not a multiple of 2"),
        ({"image_size": "16", "encoder_precision": "float32"}, "image_size '16'"),
        ({"image_size": 16, "encoder_precision": "int8"}, "encoder_precision 'int8'"),
        ({"encoder_precision": "float32"}, "image_size None"),
    ],
)
def test_a_wrong_file_of_our_form_is_one_error(tmp_path, tensors, metadata, problem):
    content = {"image_tokenizer": json.dumps({"kind": "movqgan", **metadata})}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", content)
    with pytest.raises(DataFileError, match=problem):
        load_image_tokenizer(tmp_path / "x.safetensors")


def test_a_file_of_our_form_with_other_tensors_is_named_once(tmp_path, tensors):
    content = {"image_tokenizer": json.dumps({"kind": "movqgan", "image_size": 16, "encoder_precision": "float32"})}
    safetensors.torch.save_file({**tensors, "extra": torch.ones(1)}, tmp_path / "x.safetensors", content)
    with pytest.raises(DataFileError, match="extra is unknown") as error:
        load_image_tokenizer(tmp_path / "x.safetensors")
    assert str(error.value).count("x.safetensors: ") == 1


def test_codebooks_of_two_sizes_are_two_tokenizers(tmp_path):
    for codes in (48, 64):
        torch.save(random_weights(MoVQGAN, MoVQGAN.architecture(small(n_embed=codes))), tmp_path / f"{codes}.ckpt")
    assert MoVQGAN.from_checkpoint(tmp_path / "64.ckpt").codebook_size == 64
    with pytest.raises(DataFileError, match=r"quantize.embedding.weight is \[64, 4\], expected \[48, 4\]"):
        MoVQGAN.from_checkpoint(tmp_path / "64.ckpt", SMALL)
