"""PatchTokenizer and its file: exact codes, decoding by pasting, damaged files refused."""

import json

import pytest
import safetensors.torch
import torch

from megat2i.files import DataFileError
from megat2i.tokenizers.image import load_image_tokenizer
from megat2i.tokenizers.kmeans import LARGEST
from megat2i.tokenizers.patch import PatchTokenizer, _colours, _pixels
from megat2i.tokenizers.tokenizer_file import tokenizer_file_content, write_tokenizer_file


@pytest.fixture(scope="module")
def images():
    """Smooth pictures: a few colours in large areas."""
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(0, 256, (40, 3, 4, 4), generator=generator).float()
    return torch.nn.functional.interpolate(small, size=16, mode="bilinear").round().to(torch.uint8)


@pytest.fixture(scope="module")
def tokenizer(images):
    return PatchTokenizer.fit(images, patch_size=4, codebook_size=64)


def ycocg(patches):
    """Brightness and colour differences of [N, 3, p, p], by YCoCg-R's definition."""
    red, green, blue = patches.double().unbind(1)
    orange = red - blue
    middle = blue + (orange / 2).floor()
    emerald = green - middle
    return torch.stack((middle + (emerald / 2).floor(), orange, emerald), 1)


def test_the_colour_transform_loses_nothing_and_stays_in_its_bounds():
    levels = torch.tensor([0, 1, 2, 3, 100, 127, 128, 129, 254, 255])
    pixels = torch.cartesian_prod(levels, levels, levels).to(torch.uint8)
    colours = _colours(pixels)
    assert torch.equal(_pixels(colours.float()), pixels)
    assert len(colours.unique(dim=0)) == len(pixels) and colours.abs().max() <= LARGEST
    assert torch.equal(colours.double() + torch.tensor([128, 0, 0]), ycocg(pixels[:, :, None, None])[:, :, 0, 0])


def test_codes_name_the_nearest_patch(tokenizer, images):
    codes = tokenizer.encode(images)
    assert codes.shape == (40, 16) and codes.dtype == torch.int64
    assert (tokenizer.grid, tokenizer.codebook_size) == ((4, 4), 64)
    patch = images[5, :, 4:8, 8:12].double()  # row 1, column 2
    distances = (ycocg(tokenizer.codebook) - ycocg(patch[None])).square().sum((1, 2, 3))
    assert distances[codes[5, 1 * 4 + 2]] == distances.min()


def test_decoding_pastes_the_patches_row_by_row(tokenizer):
    codes = torch.arange(16)[None]
    image = tokenizer.decode(codes)[0]
    assert torch.equal(image[:, 4:8, 8:12], tokenizer.codebook[6])
    assert torch.equal(image[:, 8:12, 0:4], tokenizer.codebook[8])


def test_encoding_a_decoded_image_gives_its_codes(tokenizer):
    codes = torch.randint(0, 64, (9, 16), generator=torch.Generator().manual_seed(3))
    assert torch.equal(tokenizer.encode(tokenizer.decode(codes)), codes)


def test_codes_depend_neither_on_the_batch_nor_on_threads(tokenizer):
    noise = torch.randint(0, 256, (30, 3, 16, 16), generator=torch.Generator().manual_seed(4)).to(torch.uint8)
    together = tokenizer.encode(noise)
    assert torch.equal(together, torch.cat([tokenizer.encode(one[None]) for one in noise]))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert torch.equal(together, tokenizer.encode(noise))
    finally:
        torch.set_num_threads(threads)


def test_fitting_helps(tokenizer, images):
    def error(candidate):
        return (candidate.decode(candidate.encode(images)).double() - images).square().mean()

    arbitrary = PatchTokenizer(torch.randint(0, 256, (64, 3, 4, 4)).to(torch.uint8), 16)
    assert error(tokenizer) < 0.2 * error(arbitrary)


def test_images_that_are_not_square(tokenizer):
    wide = torch.randint(0, 256, (2, 3, 8, 24)).to(torch.uint8)
    codes = tokenizer.encode(wide)
    assert codes.shape == (2, 12)
    assert tokenizer.decode(codes, grid=(2, 6)).shape == wide.shape
    assert torch.equal(tokenizer.encode(tokenizer.decode(codes, grid=(2, 6))), codes)
    with pytest.raises(ValueError, match="do not fill a grid of 4 x 4"):
        tokenizer.decode(codes)


def test_wrong_arguments_are_refused(tokenizer, images):
    with pytest.raises(ValueError, match="multiples of 4"):
        tokenizer.encode(torch.zeros(1, 3, 10, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="expected uint8"):
        tokenizer.encode(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="codes 0 to 64 are outside 0..63"):
        tokenizer.decode(torch.tensor([[0] * 15 + [64]]))
    with pytest.raises(ValueError, match="codes -1 to 0 are outside"):
        tokenizer.decode(torch.tensor([[0] * 15 + [-1]]))
    with pytest.raises(ValueError, match="not a multiple of the patch size 5"):
        PatchTokenizer.fit(images, patch_size=5, codebook_size=8)


def test_file_round_trip_and_digest(tokenizer, images, tmp_path):
    path = tmp_path / "image_tokenizer.safetensors"
    tokenizer.save(path)
    loaded = load_image_tokenizer(path)
    assert isinstance(loaded, PatchTokenizer) and loaded.kind == "patch"
    assert (loaded.sha256, loaded.grid, loaded.image_size) == (tokenizer.sha256, (4, 4), 16)
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    again = PatchTokenizer.fit(images, patch_size=4, codebook_size=64)
    assert again.sha256 == tokenizer.sha256
    changed = tokenizer.codebook.clone()
    changed[0, 0, 0, 0] ^= 1
    assert PatchTokenizer(changed, 16).sha256 != tokenizer.sha256


CODEBOOK = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "metadata", "problem"),
    [
        ({"codebook": CODEBOOK}, None, "not an image tokenizer's file"),
        ({"codebook": CODEBOOK}, "{", "not an image tokenizer's file"),
        ({"codebook": CODEBOOK}, "[]", "not an object"),
        ({"codebook": CODEBOOK}, {"kind": "rune"}, "kind 'rune' is none of patch"),
        ({"codebook": CODEBOOK.float()}, {"kind": "patch", "image_size": 4}, "not a patch tokenizer"),
        ({"codes": CODEBOOK}, {"kind": "patch", "image_size": 4}, "not a patch tokenizer"),
        ({"codebook": CODEBOOK[:, :2]}, {"kind": "patch", "image_size": 4}, "codebook of shape"),
        ({"codebook": CODEBOOK}, {"kind": "patch", "image_size": 5}, "image_size 5 is no multiple"),
        ({"codebook": CODEBOOK}, {"kind": "patch"}, "image_size None"),
    ],
)
def test_a_file_that_is_no_image_tokenizer_is_refused(tmp_path, tensors, metadata, problem):
    path = tmp_path / "x.safetensors"
    value = metadata if isinstance(metadata, str) else json.dumps(metadata)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, path, None if metadata is None else {"image_tokenizer": value})
    with pytest.raises(DataFileError, match=problem) as error:
        load_image_tokenizer(path)
    assert str(path) in str(error.value)


def test_bytes_that_are_no_safetensors_file_are_refused(tokenizer, tmp_path):
    path = tmp_path / "x.safetensors"
    tokenizer.save(path)
    content = path.read_bytes()
    for broken in (b"", content[:7], content[:100], content[:-1], b"\xff" * 64):
        path.write_bytes(broken)
        with pytest.raises(DataFileError, match="not an image tokenizer's file"):
            load_image_tokenizer(path)
    path.unlink()
    with pytest.raises(DataFileError, match="No such file"):
        load_image_tokenizer(path)


def test_a_crop_is_kept_and_its_absence_changes_no_byte(tmp_path):
    codebook = torch.arange(40 * 3 * 4, dtype=torch.uint8).reshape(40, 3, 2, 2)
    plain = PatchTokenizer(codebook, 8)
    plain.save(tmp_path / "plain.safetensors")
    assert b"crop" not in (tmp_path / "plain.safetensors").read_bytes()
    assert PatchTokenizer.load(tmp_path / "plain.safetensors").crop == "center"
    padded = PatchTokenizer(codebook, 8, crop="pad")
    padded.save(tmp_path / "pad.safetensors")
    assert PatchTokenizer.load(tmp_path / "pad.safetensors").crop == "pad" and padded.sha256 != plain.sha256
    content = tokenizer_file_content({"codebook": codebook}, {"kind": "patch", "image_size": 8, "crop": "round"})
    write_tokenizer_file(tmp_path / "odd.safetensors", content)
    with pytest.raises(DataFileError, match="crop 'round' is none of center, pad"):
        PatchTokenizer.load(tmp_path / "odd.safetensors")
