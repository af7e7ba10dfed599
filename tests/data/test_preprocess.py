"""The engine: right tokens and manifest, a ledger for what is bad, the same bytes however many workers; the tool."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from captioned_images import SIZE, caption, make_encoding, output_bytes, picture, run, tool, write_images
from PIL import Image

from megat2i.data.encode_part import Encoding
from megat2i.data.fit_tokenizers import fit_image_tokenizer, fit_text_tokenizer
from megat2i.data.indexed import IndexedDataset
from megat2i.data.manifest import Manifest
from megat2i.data.sources import find_parts
from megat2i.files import DataFileError
from megat2i.tokenizers.image import load_image_tokenizer
from megat2i.tokenizers.text import load_text_tokenizer


@pytest.fixture(scope="module")
def encoding(tmp_path_factory):
    return make_encoding(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture
def small_parts(monkeypatch):
    """Blocks of 4 samples, so that a few images make several parts."""
    monkeypatch.setattr("megat2i.data.sources.BLOCK", 4)


def ledger(prefix: Path) -> dict[str, str]:
    lines = Path(f"{prefix}.ledger.jsonl").read_text().splitlines()
    return {line["sample"]: line["reason"] for line in map(json.loads, lines)}


def test_documents_are_the_captions_and_images_in_order(tmp_path, encoding, small_parts):
    source = write_images(tmp_path / "in", 10)
    summary = run(source, tmp_path / "out" / "train", encoding)
    store = IndexedDataset(tmp_path / "out" / "train")
    text, image = load_text_tokenizer(encoding.text_tokenizer), load_image_tokenizer(encoding.image_tokenizer)
    assert (store.number_of_documents, store.dtype, summary.refused) == (10, np.uint16, 0)
    assert store.modes.tolist() == [0, 1] * 10
    for number in range(10):
        first, second = store.document(number)
        assert text.decode(store.sequence(first).tolist()) == caption(number)
        square = picture(number).crop((2, 0, 18, 16))
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None]
        assert store.sequence(second).tolist() == image.encode(pixels)[0].tolist()
    assert not (tmp_path / "out" / "train.parts").exists()


def test_the_manifest_says_what_is_there(tmp_path, encoding, small_parts):
    source = write_images(tmp_path / "in", 10)
    manifest = run(source, tmp_path / "out" / "train", encoding).manifest
    assert manifest == Manifest.read(tmp_path / "out" / "train")
    manifest.verify(tmp_path / "out" / "train")
    store = IndexedDataset(tmp_path / "out" / "train")
    texts = np.concatenate([store.sequence(i) for i in range(0, 20, 2)])
    codes = np.concatenate([store.sequence(i) for i in range(1, 20, 2)])
    assert (manifest.text.min_id, manifest.text.max_id) == (texts.min(), texts.max())
    assert (manifest.image.min_code, manifest.image.max_code) == (codes.min(), codes.max())
    assert (manifest.tokens.text, manifest.tokens.image) == (len(texts), len(codes)) and len(codes) == 40
    assert (manifest.image.grid, manifest.image.image_size, manifest.image.crop) == ((2, 2), SIZE, "center")
    assert manifest.image.sha256 == load_image_tokenizer(encoding.image_tokenizer).sha256
    assert (tmp_path / "out" / manifest.text.tokenizer).resolve() == encoding.text_tokenizer
    (only,) = manifest.sources
    assert (only.name, only.samples, only.size) == ("captions.jsonl", 10, source.stat().st_size)


def test_bytes_do_not_depend_on_workers(tmp_path, encoding, small_parts):
    source = write_images(tmp_path / "in", 22)
    (tmp_path / "in" / "0005.png").write_bytes(b"broken")
    (tmp_path / "in" / "0013.png").unlink()
    for workers in (1, 2, 3):
        summary = run(source, tmp_path / str(workers) / "train", encoding, workers)
        assert (summary.manifest.documents, summary.refused) == (20, 2)
        assert output_bytes(tmp_path / str(workers) / "train") == output_bytes(tmp_path / "1" / "train")
    assert list(ledger(tmp_path / "1" / "train")) == ["line 6: 0005.png", "line 14: 0013.png"]
    other = Encoding(encoding.text_tokenizer, encoding.image_tokenizer, "pad")
    run(source, tmp_path / "pad" / "train", other)
    assert output_bytes(tmp_path / "pad" / "train")[".bin"] != output_bytes(tmp_path / "1" / "train")[".bin"]


def hostile_folder(folder: Path) -> Path:
    """One image of every troublesome kind, with names that say what it is."""
    folder.mkdir(parents=True)

    def save(name, image, text="a caption", **options):
        image.save(folder / name, **options)
        (folder / name).with_suffix(".txt").write_text(text)

    save("plain.jpg", picture(1, (300, 200)))
    save("cmyk.jpg", picture(2).convert("CMYK"))
    save("palette.png", picture(3).convert("P"))
    save("alpha.png", picture(4).convert("RGBA"))
    save("grey16.png", Image.fromarray(np.full((20, 20), 30_000, np.uint16)))
    save("rotated.webp", picture(5), exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0")
    save("long.png", picture(6), text="word " * 1000)
    save("empty.png", picture(7), text="  \n")
    save("truncated.jpg", picture(8, (300, 200)))
    content = (folder / "truncated.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(content[: len(content) // 2])
    (folder / "gif.png").write_bytes(_gif())
    (folder / "gif.txt").write_text("a GIF that calls itself PNG")

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compressobj()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0))
    pixels = b"".join(rows.compress(bytes(2501)) for _ in range(20_000)) + rows.flush()
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
    (folder / "bomb.txt").write_text("a valid image of 20,000 x 20,000 pixels")
    return folder


def _gif() -> bytes:
    buffer = io.BytesIO()
    picture(9).save(buffer, "GIF")
    return buffer.getvalue()


def test_a_folder_of_troublesome_images_finishes_with_the_right_ledger(tmp_path):
    folder = hostile_folder(tmp_path / "my photos")
    prefix = tmp_path / "out" / "train"
    arguments = ("--output-prefix", prefix, "--train-text-tokenizer", 300, "--codebook-size", 16, "--workers", 1)
    result = tool("--input", folder, *arguments)
    assert "7 captioned images" in result.stdout and "4 samples refused" in result.stdout
    found = ledger(prefix)
    assert set(found) == {"bomb.png", "empty.png", "gif.png", "truncated.jpg"}
    assert "megapixels" in found["bomb.png"] and found["empty.png"] == "empty caption"
    assert "not a JPEG, PNG or WebP" in found["gif.png"] and "truncated" in found["truncated.jpg"]
    store = IndexedDataset(prefix)
    text = load_text_tokenizer(tmp_path / "out" / "text_tokenizer.json")
    captions = [text.decode(store.sequence(i).tolist()) for i in range(0, len(store), 2)]
    names = sorted(path.name for path in folder.glob("*.*g*") if path.name not in found and path.suffix != ".txt")
    names += ["rotated.webp"]
    assert len(captions) == 7 and captions[names.index("long.png")] == ("word " * 1000).strip()  # kept whole


def test_when_nothing_is_readable_there_is_one_error_and_no_dataset(tmp_path, encoding):
    source = write_images(tmp_path / "in", 3)
    for path in tmp_path.glob("in/*.png"):
        path.write_bytes(b"broken")
    prefix = tmp_path / "out" / "train"
    with pytest.raises(DataFileError, match="no sample of the inputs can be used; the first: line 1: 0000.png: not a"):
        run(source, prefix, encoding)
    assert [path.name for path in prefix.parent.iterdir()] == ["train.ledger.jsonl"]
    assert len(ledger(prefix)) == 3


def test_ids_above_65535_get_a_wider_type(tmp_path, encoding, monkeypatch):
    source = write_images(tmp_path / "in", 3)
    monkeypatch.setattr("megat2i.data.encode_part.UINT16_IDS", load_text_tokenizer(encoding.text_tokenizer).vocab_size)
    run(source, tmp_path / "a", encoding)
    monkeypatch.setattr("megat2i.data.encode_part.UINT16_IDS", 100)
    run(source, tmp_path / "b", encoding)
    narrow, wide = IndexedDataset(tmp_path / "a"), IndexedDataset(tmp_path / "b")
    assert (narrow.dtype, wide.dtype) == (np.uint16, np.int32)
    assert all(np.array_equal(narrow.sequence(i), wide.sequence(i)) for i in range(6))


# Tokenizers from the corpus


def test_fitted_tokenizers_are_the_same_every_time(tmp_path, small_parts):
    parts = find_parts([str(write_images(tmp_path / "in", 30))], "train")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        fit_text_tokenizer(parts, 300, tmp_path / name / "text.json", overwrite=False)
        fit_image_tokenizer(parts, SIZE, 8, 32, "center", tmp_path / name / "image.safetensors", overwrite=False)
    for name in ("text.json", "image.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    fewer = parts[:3]
    with pytest.raises(DataFileError, match="there is another tokenizer, and datasets may depend on it"):
        fit_image_tokenizer(fewer, SIZE, 8, 32, "center", tmp_path / "a" / "image.safetensors", overwrite=False)
    fit_image_tokenizer(fewer, SIZE, 8, 32, "center", tmp_path / "a" / "image.safetensors", overwrite=True)
    assert (tmp_path / "a" / "image.safetensors").read_bytes() != (tmp_path / "b" / "image.safetensors").read_bytes()


def test_what_cannot_be_fitted_is_one_error(tmp_path):
    parts = find_parts([str(write_images(tmp_path / "in", 3))], "train")
    with pytest.raises(DataFileError, match="12 distinct patches, too few for a codebook of 500"):
        fit_image_tokenizer(parts, SIZE, 8, 500, "center", tmp_path / "i.safetensors", overwrite=False)
    for path in tmp_path.glob("in/*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(DataFileError, match="no readable image .* line 1: 0000.png: not a JPEG"):
        fit_image_tokenizer(parts, SIZE, 8, 4, "center", tmp_path / "i.safetensors", overwrite=False)
    (tmp_path / "in" / "captions.jsonl").write_text('{"image": "0000.png", "caption": " "}')
    parts = find_parts([str(tmp_path / "in" / "captions.jsonl")], "train")
    with pytest.raises(DataFileError, match="no caption to train on. .* empty caption"):
        fit_text_tokenizer(parts, 300, tmp_path / "t.json", overwrite=False)


# The command line, in this process


def test_openmoji_valid_takes_the_tokenizers_of_train(tmp_path, encoding, command_line, capsys):
    common = ("--input", "openmoji", "--split", "valid", "--output-prefix", tmp_path / "valid", "--workers", 1)
    command_line(*common, "--text-tokenizer", encoding.text_tokenizer, "--image-tokenizer", encoding.image_tokenizer)
    assert "205 captioned images" in capsys.readouterr().out
    assert Manifest.read(tmp_path / "valid").sources[0].name == "openmoji"
    with pytest.raises(SystemExit):
        command_line(*common, "--train-text-tokenizer", 300)
    assert "tokenizers come from the train split" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--input", "nowhere"], "nowhere: no such file or folder"),
        (["--input", "{in}", "--image-size", 30], "--image-size 30 is not a multiple of --patch-size 4"),
        (["--input", "{in}", "--workers", 0], "--workers is 0"),
        (["--input", "{in}", "--image-tokenizer", "none.safetensors"], "none.safetensors: cannot be read"),
        (["--input", "{in}", "--image-tokenizer", "x", "--patch-size", 2], "--patch-size belongs to"),
        (["--input", "{in}", "--image-tokenizer", "{file}", "--image-size", 32], "made for images of 16 pixels"),
        (["--input", "{in}", "--train-text-tokenizer", 200], "--train-text-tokenizer needs at least 256"),
    ],
)
def test_wrong_arguments_are_one_sentence(tmp_path, encoding, command_line, capsys, arguments, problem):
    names = {"{in}": write_images(tmp_path / "in", 1), "{file}": encoding.image_tokenizer}
    arguments = [names.get(argument, argument) for argument in arguments]
    with pytest.raises(SystemExit) as end:
        command_line("--output-prefix", tmp_path / "out" / "train", "--train-text-tokenizer", 300, *arguments)
    assert end.value.code not in (0, None)
    said = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    assert problem in said and "\n" not in said
    assert not list(tmp_path.glob("out/train*"))
