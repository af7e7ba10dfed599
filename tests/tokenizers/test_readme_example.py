"""The README's example of another tokenizer works as it stands: one class and a file, through preprocessing."""

import re

import pytest
import torch
from PIL import Image

import megat2i.tokenizers.image as registry
from megat2i.data.encode_part import Encoding, open_tokenizers
from megat2i.data.indexed import IndexedDataset
from megat2i.data.manifest import Manifest
from megat2i.data.preprocess import preprocess
from megat2i.data.sources import find_parts
from megat2i.tokenizers.text import train_text_tokenizer
from megat2i.tokenizers.tokenizer_file import tokenizer_file_content, write_tokenizer_file


@pytest.fixture
def colour_tokenizer(repository, monkeypatch):
    text = (repository / "README.md").read_text()
    (source,) = re.findall(r"```python\n(class ColourTokenizer.*?)```", text, re.DOTALL)
    names = {"torch": torch}
    exec(source, names)
    monkeypatch.setitem(registry.KINDS, "colour", names["ColourTokenizer"])
    return names["ColourTokenizer"]


def test_the_example_goes_through_preprocessing(tmp_path, colour_tokenizer):
    content = tokenizer_file_content({}, {"kind": "colour", "image_size": 16})
    write_tokenizer_file(tmp_path / "colour.safetensors", content)
    train_text_tokenizer(["a red square"] * 9, 300, tmp_path / "text.json")
    (tmp_path / "in").mkdir()
    Image.new("RGB", (16, 16), (224, 32, 96)).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "a.txt").write_text("a red square")
    encoding = Encoding(tmp_path / "text.json", tmp_path / "colour.safetensors", colour_tokenizer.crop)
    preprocess(find_parts([str(tmp_path / "in")], "train"), tmp_path / "train", encoding, 1, False)
    codes = torch.from_numpy(IndexedDataset(tmp_path / "train").sequence(1).astype("int64"))
    assert codes.tolist() == [3 * 16 + 0 * 4 + 1] * 4
    image = open_tokenizers(encoding)[1].decode(codes[None])
    assert image.shape == (1, 3, 16, 16) and image[0, :, 3, 12].tolist() == [224, 32, 96]
    manifest = Manifest.read(tmp_path / "train").image
    assert (manifest.kind, manifest.codebook_size, manifest.grid) == ("colour", 64, (2, 2))
