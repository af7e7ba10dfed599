"""MoVQGAN: equal to the original's golden files, its keys, its image preparation, any size and batch."""

import ast
import functools
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_networks import SMALL, random_images, random_weights, small

from megat2i.tokenizers.movqgan import MoVQGAN, prepare
from megat2i.tokenizers.vqgan import Downsample

MARGIN = 1e-3  # codes are compared where the second best is further away than this


@pytest.fixture(scope="module")
def movqgan_golden(golden) -> Path:
    return golden / "movqgan"


@pytest.fixture
def tiny(movqgan_golden) -> MoVQGAN:
    config = json.loads((movqgan_golden / "golden.json").read_text())["tiny"]["config"]
    return MoVQGAN.from_checkpoint(movqgan_golden / "tiny_state_dict.safetensors", config)


@functools.cache
def read_io(folder: Path, name: str) -> dict[str, torch.Tensor]:
    with np.load(folder / f"{name}_io.npz") as file:
        arrays = {key: file[key] for key in file.files}
    for key in ("indices", "rand_codes"):
        arrays[key] = arrays[key].astype(np.int64).reshape(len(arrays[key]), -1)
    return {key: torch.from_numpy(array) for key, array in arrays.items()}


def encoder_faults(model: MoVQGAN, io: dict[str, torch.Tensor]) -> list[str]:
    """What differs from the original beyond the tolerances."""
    latents, sure = model.latents(io["image_u8"]), io["margin"].flatten(1) > MARGIN
    wrong = (model.quantise(latents) != io["indices"]) & sure
    faults = ["latents"] if (latents - io["pre_quant"]).abs().max() > 5e-5 else []
    return faults + (["codes"] if wrong.any() else [])


def decoder_faults(model: MoVQGAN, io: dict[str, torch.Tensor], tolerance: float = 2e-4) -> list[str]:
    pairs = (("indices", "decoded"), ("rand_codes", "decoded_rand"))
    return [
        image for codes, image in pairs if (model.decode_float(io[codes]) - io[image].float()).abs().max() > tolerance
    ]


# Against the original


def test_tiny_equals_the_original(tiny, movqgan_golden):
    io = read_io(movqgan_golden, "tiny")
    assert encoder_faults(tiny, io) == [] and decoder_faults(tiny, io) == []
    codes = tiny.encode(io["image_u8"])
    assert (codes.shape, codes.dtype) == ((2, 1024), torch.int64)
    assert torch.equal(codes, tiny.quantise(tiny.latents(io["image_u8"])))
    assert codes[0, :10].tolist() == [202, 148, 116, 11, 202, 367, 183, 148, 0, 102]
    images = tiny.decode(io["indices"])
    difference = (images.int() - io["decoded_u8"].int()).abs()
    assert images.dtype == torch.uint8 and difference.max() <= 1 and (difference > 0).float().mean() < 1e-3


def test_67m_equals_the_original(movqgan_golden, tmp_path):
    facts = json.loads((movqgan_golden / "golden.json").read_text())["67M"]
    recipe = runpy.run_path(str(movqgan_golden / "recipe.py"))["recipe"]
    statistics = facts["codebook_mean"], facts["codebook_std"]
    tensors = {}
    for name, shape in published_keys(movqgan_golden / "movq_67m_keys.txt").items():
        extra = statistics if name == "quantize.embedding.weight" else ()
        tensors[name] = torch.from_numpy(recipe(name, shape, *extra))
    torch.save(tensors, tmp_path / "movqgan_67M.ckpt")
    model = MoVQGAN.from_checkpoint(tmp_path / "movqgan_67M.ckpt", "67M")
    io = read_io(movqgan_golden, "67M")
    assert encoder_faults(model, io) == []
    assert decoder_faults(model, io, 2e-3) == []  # these images are stored in half precision
    assert model.codebook_size == 16384 and model.grid == (32, 32)


def swap_guide(model):
    forward = model.decoder.forward
    model.decoder.forward = lambda z, guide: forward(z, z)


def pad_upper_left(model):
    for module in model.modules():
        if isinstance(module, Downsample):
            module.forward = lambda x, conv=module.conv: conv(F.pad(x, (1, 0, 1, 0)))


def reverse_levels(model):
    levels = list(model.decoder.up[3].block)
    model.decoder.up[3].block = torch.nn.ModuleList(reversed(levels))


ENCODER_BREAKS = {
    "eps": lambda model: setattr(model.encoder.down[0].block[0].norm1, "eps", 1e-5 * 20),
    "padding": pad_upper_left,
    "no attention": lambda model: setattr(model.encoder.down[3], "attn", None),
}
DECODER_BREAKS = {
    "eps": lambda model: setattr(model.decoder.norm_out.norm_layer, "eps", 1e-3),
    "guide": swap_guide,
    "block order": reverse_levels,
    "scale and shift": lambda model: setattr(model.decoder.norm_out, "conv_y", model.decoder.norm_out.conv_b),
}


@pytest.mark.parametrize("name", ENCODER_BREAKS)
def test_the_encoder_comparison_notices(tiny, movqgan_golden, name):
    ENCODER_BREAKS[name](tiny)
    assert "latents" in encoder_faults(tiny, read_io(movqgan_golden, "tiny"))


@pytest.mark.parametrize("name", DECODER_BREAKS)
def test_the_decoder_comparison_notices(tiny, movqgan_golden, name):
    DECODER_BREAKS[name](tiny)
    assert decoder_faults(tiny, read_io(movqgan_golden, "tiny")) == ["decoded", "decoded_rand"]


def test_the_comparison_of_codes_notices(tiny, movqgan_golden):
    tiny.quantize.embedding.weight[202] += 0.5
    assert encoder_faults(tiny, read_io(movqgan_golden, "tiny")) == ["codes"]


def published_keys(path: Path) -> dict[str, tuple[int, ...]]:
    lines = (line.rstrip("\n").split("\t") for line in path.open() if not line.startswith("#"))
    return {name: ast.literal_eval(shape) for name, shape in lines}


@pytest.mark.parametrize(
    ("size", "tensors", "parameters"),
    [("67M", 431, 67_832_495), ("102M", 671, 101_614_255), ("270M", 431, 270_669_103)],
)
def test_state_dicts_have_the_published_keys(golden, size, tensors, parameters):
    with torch.device("meta"):
        state = MoVQGAN(MoVQGAN.sizes[size]).state_dict()
    assert (len(state), sum(value.numel() for value in state.values())) == (tensors, parameters)
    file = golden / "movqgan" / f"movq_{size.lower()}_keys.txt"
    if size != "102M":  # of which there is no list
        assert {name: tuple(value.shape) for name, value in state.items()} == published_keys(file)


# Configurations


@pytest.mark.parametrize("name", ["67M", "102M", "270M"])
def test_sizes_by_name_are_those_of_the_originals_fields(name):
    fields = {"67M": {}, "102M": {"num_res_blocks": 4}, "270M": {"ch": 256}}[name]
    published = {"resolution": 256, "ch": 128, "ch_mult": [1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [32]}
    assert MoVQGAN.architecture(small(**{**published, **fields}, n_embed=16384)) == MoVQGAN.sizes[name]


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ("5B", "size '5B' is none of 67M, 102M, 270M"),
        ({"ddconfig": SMALL["ddconfig"]}, "has ddconfig, n_embed and embed_dim"),
        ({**SMALL, "ddconfig": {"ch": 32}}, "attn_resolutions, ch_mult.* missing or unknown"),
        ({**SMALL, "ddconfig": {**SMALL["ddconfig"], "tanh_out": True}}, "tanh_out missing or unknown"),
        (small(double_z=True), "double_z is True, only False"),
        (small(in_channels=1), "in_channels is 1"),
        (small(resolution=15), "resolution 15 cannot be halved for 2 levels"),
        (small(ch_mult=[]), "cannot be halved for 0 levels"),
        (small(ch_mult=2), "ch_mult is 2, expected a list"),
        (small(ch_mult=[1, 0]), r"multipliers are \(1, 0\)"),
        (small(ch=40), "40 channels are not a multiple of 32"),
        (small(num_res_blocks="2"), "blocks is '2', expected a whole number"),
        (small(embed_dim=0), "embed_dim is 0"),
    ],
)
def test_wrong_configurations_are_one_error(tmp_path, config, problem):
    torch.save(random_weights(MoVQGAN, MoVQGAN.architecture(SMALL)), tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=problem):
        MoVQGAN.from_checkpoint(tmp_path / "x.ckpt", config)


# Sizes, batches, devices' arithmetic


def make(tmp_path, config=SMALL, scale=1.0, **options) -> MoVQGAN:
    torch.save(random_weights(MoVQGAN, MoVQGAN.architecture(config), scale), tmp_path / "small.ckpt")
    return MoVQGAN.from_checkpoint(tmp_path / "small.ckpt", config, image_size=16, **options)


def test_images_need_not_be_square_and_batches_do_not_matter(tmp_path, monkeypatch):
    model = make(tmp_path)
    images = random_images(5, 12, 20)
    codes = model.encode(images)
    assert codes.shape == (5, 6 * 10) and len(codes.unique()) > 10
    assert torch.equal(codes, torch.cat([model.encode(image[None]) for image in images]))
    pictures = model.decode(codes, (6, 10))
    assert pictures.shape == images.shape and len(pictures.unique()) > 50
    wide = model.decode_float(codes, (6, 10))
    assert not torch.allclose(wide.flatten(2), model.decode_float(codes, (10, 6)).flatten(2), atol=1e-2)
    monkeypatch.setattr("megat2i.tokenizers.vq_tokenizer.PIXELS", {"cpu": 2 * 12 * 20})  # passes of 2, 2 and 1
    assert torch.equal(model.encode(images), codes) and torch.equal(model.decode(codes, (6, 10)), pictures)
    monkeypatch.setattr("megat2i.tokenizers.vq_tokenizer.SCORES", {"cpu": 7 * model.codebook_size})
    assert torch.equal(model.encode(images), codes)
    assert model.encode(images[:0]).shape == (0, 60) and model.decode(codes[:0], (6, 10)).shape == (0, 3, 12, 20)


@pytest.mark.parametrize(("z_channels", "embed_dim"), [(4, 4), (6, 3), (3, 8)])
def test_z_channels_may_differ_from_embed_dim(tmp_path, z_channels, embed_dim):
    """The guide of the norms has embed_dim channels, the decoder's input z_channels: as plain operations say."""
    model = make(tmp_path, small(z_channels=z_channels, embed_dim=embed_dim))
    images = random_images(1, 16, 16)
    weights = model.state_dict()
    latents = F.conv2d(model.encoder(images / 127.5 - 1), weights["quant_conv.weight"], weights["quant_conv.bias"])
    vectors = latents.flatten(2).mT.double()
    nearest = torch.cdist(vectors, weights["quantize.embedding.weight"].double()[None]).argmin(-1)
    codes = model.encode(images)
    assert latents.shape[1] == embed_dim and torch.equal(codes, nearest)
    quantised = weights["quantize.embedding.weight"][codes[0]].T.reshape(1, embed_dim, 8, 8)
    z = F.conv2d(quantised, weights["post_quant_conv.weight"], weights["post_quant_conv.bias"])
    assert z.shape[1] == z_channels
    assert torch.allclose(model.decode_float(codes), model.decoder(z, quantised), atol=1e-5)


def test_attention_is_placed_by_the_configuration_not_by_the_image(tmp_path):
    upper = make(tmp_path, small(attn_resolutions=[16]))
    assert "encoder.down.0.attn.0.q.weight" in upper.state_dict()
    assert "encoder.down.1.attn.0.q.weight" not in upper.state_dict()
    upper.encode(random_images(1, 8, 8))


def test_lower_precision_concerns_the_encoder_alone(tmp_path):
    exact, low = make(tmp_path), make(tmp_path, encoder_precision="bfloat16")
    images = random_images(8, 16, 16)
    assert low.latents(images).dtype == torch.float32 and not torch.equal(low.latents(images), exact.latents(images))
    agreement = (low.encode(images) == exact.encode(images)).float().mean()
    assert 0.8 < agreement < 1
    latents = exact.latents(images)
    assert torch.equal(low.quantise(latents), exact.quantise(latents))
    codes = exact.encode(images)
    assert torch.equal(low.decode_float(codes), exact.decode_float(codes))
    assert all(value.dtype == torch.float32 for value in low.state_dict().values())
    with pytest.raises(ValueError, match="tf32 needs a CUDA device"):
        make(tmp_path, encoder_precision="tf32").encode(images)
    with pytest.raises(ValueError, match="'float16' is none of float32, tf32, bfloat16"):
        make(tmp_path, encoder_precision="float16")


def test_the_processs_own_choice_of_arithmetic_does_not_matter(tmp_path):
    model, images = make(tmp_path), random_images(2, 16, 16)
    codes, latents = model.encode(images), model.latents(images)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(model.encode(images), codes) and torch.equal(model.latents(images), latents)
        assert torch.get_float32_matmul_precision() == "medium"  # given back
    finally:
        torch.set_float32_matmul_precision(before)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encode(images), codes)


def test_codes_and_images_can_be_used_in_training(tmp_path):
    model = make(tmp_path)
    table = torch.nn.Embedding(model.codebook_size, 2)
    table(model.encode(random_images(1, 16, 16))).sum().backward()  # saves the codes: not possible in inference mode
    assert table.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda model: model.encode(torch.zeros(1, 3, 16, 16)), "expected images uint8"),
        (lambda model: model.encode(random_images(1, 16, 16)[0]), "expected images uint8"),
        (lambda model: model.encode(random_images(1, 15, 16)), "multiples of 2 pixels"),
        (lambda model: model.decode(torch.zeros(1, 8, dtype=torch.long)), "pass grid="),
        (lambda model: model.decode(torch.zeros(1, 8, dtype=torch.long), (3, 3)), "do not fill a grid of 3 x 3"),
        (lambda model: model.decode(torch.full((1, 4), 48)), "codes 48 to 48 are outside 0..47"),
        (lambda model: model.decode(torch.tensor([[0, 0, 0, -1]])), "codes -1 to 0 are outside"),
        (lambda model: model.decode(torch.zeros(1, 4)), "expected integer codes"),
    ],
)
def test_wrong_arguments_are_one_error(tmp_path, call, problem):
    with pytest.raises(ValueError, match=problem):
        call(make(tmp_path))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_a_gpu_gives_the_originals_codes_and_pictures(tiny, movqgan_golden, precision):
    io = read_io(movqgan_golden, "tiny")
    tiny.to("cuda").encoder_precision = precision
    codes, sure = tiny.encode(io["image_u8"].cuda()).cpu(), io["margin"].flatten(1) > MARGIN
    agreement = (codes == io["indices"])[sure].float().mean()
    assert agreement == 1 if precision == "float32" else 0.9 < agreement < 1
    assert (tiny.decode_float(io["indices"]).cpu() - io["decoded"]).abs().max() < 2e-4
    assert tiny.encode(io["image_u8"]).device.type == "cpu"  # where the images are


def test_codes_of_16_bits_decode(tmp_path):
    model = make(tmp_path)
    codes = torch.arange(48)[None, :36]
    assert torch.equal(model.decode(codes), model.decode(codes.to(torch.uint16)))


# The original's image preparation


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Random colours, and random transparency where the mode has it."""
    red, green, blue, alpha = np.random.default_rng(width).integers(0, 256, (4, height, width), dtype=np.uint8)
    image = Image.fromarray(np.stack((red, green, blue), 2)).convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(alpha))
    return image


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


BICUBIC = Image.Resampling.BICUBIC


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((300, 260), (20, 0, 280, 260)),
        ((258, 255), (2, 0, 256, 255)),  # 1.5 and 256.5 to even: one column too narrow
        ((260, 255), (2, 0, 258, 255)),  # 2.5 and 257.5: one too wide
        ((255, 260), (0, 2, 255, 258)),
        ((90, 61), (14, 0, 76, 61)),
    ],
)
def test_the_crop_has_the_originals_halves_of_a_pixel(size, box):
    image = noise(*size)
    expected = image.crop(box).resize((256, 256), BICUBIC)  # below 512 pixels there is no box reduction
    assert torch.equal(prepare(image), pixels(expected))
    side = min(size)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    usual = pixels(image.crop((left, top, left + side, top + side)).resize((256, 256), BICUBIC))
    assert torch.equal(prepare(image), usual) == (box[2] - box[0] == box[3] - box[1] == side and (left, top) == box[:2])


@pytest.mark.parametrize(("side", "factor"), [(511, 1), (512, 2), (700, 2), (1024, 4), (1300, 5)])
def test_large_images_are_reduced_by_a_whole_number_first(side, factor):
    image = noise(side, side)
    inner = (0, 0, side / factor, side / factor)
    expected = image.reduce(factor).resize((256, 256), BICUBIC, box=inner)
    result = prepare(image)
    assert torch.equal(result, pixels(expected))
    assert torch.equal(result, pixels(image.resize((256, 256), BICUBIC))) == (factor == 1)


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "CMYK", "LA"])
def test_conversion_to_rgb_comes_last(mode):
    image = noise(300, 300, mode)
    result = prepare(image, 64)
    assert (result.shape, result.dtype, result.is_contiguous()) == ((3, 64, 64), torch.uint8, True)
    resized = image.resize((64, 64), BICUBIC, reducing_gap=1)  # Pillow itself takes NEAREST for P and 1
    assert torch.equal(result, pixels(resized.convert("RGB")))
    first = prepare(image.convert("RGB"), 64)
    assert torch.equal(result, first) == (mode == "L")


def test_exif_orientation_is_ignored():
    image = noise(40, 20)
    turned = image.copy()
    turned.getexif()[0x0112] = 6
    assert torch.equal(prepare(turned, 16), prepare(image, 16))
