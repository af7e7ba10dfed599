"""Folders of images: order, prompts and digest, and one clear error for whatever is not whole."""

import hashlib
import json

import pytest
from PIL import Image

from megat2i.data.images import to_tensor
from megat2i.evaluate.image_folder import ImageFolder
from megat2i.files import DataFileError


@pytest.fixture
def folder(tmp_path):
    """Five pictures in four formats, one of them with an orientation, and what is no picture."""
    for number, name in enumerate(("e.png", "a.jpg", "c.JPEG", "b.webp", "d.png")):
        Image.new("RGB", (12, 9), (number * 50, 0, 0)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def generated(folder, names, **more) -> None:
    lines = [json.dumps({"prompt": f"about {name}", "seed": 0, "file": name, **more}) for name in names]
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")


def test_all_pictures_in_the_order_of_their_names(folder):
    images = ImageFolder.open(folder)
    assert images.names == ["a.jpg", "b.webp", "c.JPEG", "d.png", "e.png"] and images.prompts is None
    reds = [round(float(image[0].float().mean()) / 50) for image in images.prepared(to_tensor)]
    assert reds == [1, 3, 2, 4, 0]


def test_the_digest_is_of_names_and_bytes(folder):
    def digest() -> str:
        images = ImageFolder.open(folder)
        assert len(list(images.prepared(to_tensor))) == len(images.names)
        return images.description()["sha256"]

    first = digest()
    assert digest() == first
    (folder / "a.jpg").rename(folder / "f.jpg")
    second = digest()
    Image.new("RGB", (12, 9), (0, 0, 1)).save(folder / "e.png")
    assert len({first, second, digest()}) == 3


def test_a_folder_of_the_generator_has_its_order_and_prompts(folder):
    generated(folder, ["e.png", "a.jpg"])
    Image.new("RGB", (99, 99)).save(folder / "grid.png")
    images = ImageFolder.open(folder)
    assert images.names == ["e.png", "a.jpg"] and images.prompts == ["about e.png", "about a.jpg"]
    assert len(list(images.prepared(to_tensor))) == 2
    prompts = images.description()["prompts"]
    assert prompts["sha256"] == hashlib.sha256(b"about e.png\nabout a.jpg\n").hexdigest()
    assert prompts["file_sha256"] == hashlib.sha256((folder / "samples.jsonl").read_bytes()).hexdigest()


def test_an_incomplete_folder_is_refused(folder):
    generated(folder, ["e.png", "00001-lost-0.png", "a.jpg", "00003-lost-0.png"])
    with pytest.raises(
        DataFileError, match=r"2 of its 4 images are missing, the first is 00001-lost-0\.png"
    ) as refused:
        ImageFolder.open(folder)
    assert "goes on" in str(refused.value)


@pytest.mark.parametrize("text", ["", "{}\n", '{"file": "e.png"}\n', "[1]\n", "not json\n", "\xff\n"])
def test_a_damaged_list_is_refused(folder, text):
    (folder / "samples.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataFileError, match=r"samples\.jsonl"):
        ImageFolder.open(folder)


def test_a_list_cannot_name_files_elsewhere(folder):
    Image.new("RGB", (9, 9)).save(folder.parent / "outside.png")
    generated(folder, ["../outside.png"])
    with pytest.raises(DataFileError, match="missing"):
        ImageFolder.open(folder)


def test_a_damaged_picture_is_named(folder):
    whole = (folder / "d.png").read_bytes()
    (folder / "d.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataFileError, match=r"d\.png: cannot be measured"):
        list(ImageFolder.open(folder).prepared(to_tensor))


def test_no_folder_and_no_pictures(tmp_path):
    with pytest.raises(DataFileError, match="no such folder"):
        ImageFolder.open(tmp_path / "nowhere")
    with pytest.raises(DataFileError, match="holds no"):
        ImageFolder.open(tmp_path)
