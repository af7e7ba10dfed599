"""tools/verify_data.py and tools/merge_data.py as they are started: every kind of fault is one line and status 1."""

import dataclasses
import functools
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megat2i.data.codebook_use import CodebookUse
from megat2i.data.indexed import IndexedWriter
from megat2i.data.manifest import ImageContent, Manifest, Source, TextContent, TokenCounts
from megat2i.files import write_file
from megat2i.tokenizers.patch import PatchTokenizer
from megat2i.tokenizers.text import train_text_tokenizer

CODES = 8


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """A text tokenizer, and an image tokenizer whose codes are eight colours."""
    folder = tmp_path_factory.mktemp("tokenizers")
    text = train_text_tokenizer(["a red square", "a blue square"], 270, folder / "text.json")
    colours = torch.tensor([[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)], dtype=torch.uint8)
    image = PatchTokenizer(colours[:, :, None, None].expand(CODES, 3, 8, 8), 16)
    image.save(folder / "image.safetensors")
    return text, image


@pytest.fixture
def dataset(tmp_path, tokenizers):
    """Prefix of a finished dataset of 5 captioned images of 4 codes."""
    return write(tmp_path / "train", tokenizers)


def write(prefix: Path, tokenizers, code: int | None = None, **changed) -> Path:
    text, image = tokenizers
    for path in text.path.parent.iterdir():
        (prefix.parent / path.name).write_bytes(path.read_bytes())
    ids = [np.array(text.encode([f"a {name} square"])[0]) for name in ("red", "blue", "red", "blue", "red")]
    codes = np.array([[4] * 4, [1] * 4, [4] * 4, [1] * 4, [4, 4, 4, 4 if code is None else code]])
    with IndexedWriter(prefix, np.uint16) as writer:
        for caption, picture in zip(ids, codes, strict=True):
            writer.add_document([caption, picture], [0, 1])
    ids = np.concatenate(ids)
    content = TextContent(text.vocab_size, int(ids.min()), int(ids.max()), "text.json", text.kind, text.sha256)
    picture = ImageContent(
        CODES, int(codes.min()), int(codes.max()), (2, 2), 16, "center", "float32", "image.safetensors", "patch",
        image.sha256,
    )  # fmt: skip
    manifest = Manifest(
        5, 10, TokenCounts(len(ids), 20), "uint16", content, picture, (Source("a", 5, size=1),),
        writer.digests.index_sha256, writer.digests.bin_blocks,
    )  # fmt: skip
    dataclasses.replace(manifest, **changed).write(prefix)
    counts = np.bincount(codes.ravel()[codes.ravel() < CODES], minlength=CODES)
    write_file(Path(f"{prefix}.codebook.json"), CodebookUse(counts).content())
    return prefix


@pytest.fixture
def start(repository):
    """Function of (tool, arguments) -> (exit status, lines of output, errors)."""

    def run(tool: str, *arguments) -> tuple[int, list[str], str]:
        command = [sys.executable, str(repository / "tools" / tool), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout.splitlines(), done.stderr

    return run


@pytest.fixture
def verify_data(repository):
    """The tool as a module."""
    spec = importlib.util.spec_from_file_location("verify_data", repository / "tools" / "verify_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flip(path: Path, at: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def test_a_good_dataset_and_its_pictures(start, dataset, tmp_path):
    status, lines, _ = start("verify_data.py", dataset, "--samples", 2, "--grid", tmp_path / "grid.png")
    assert status == 0 and lines[-1] == "no fault in 1 dataset"
    assert lines[0].startswith(f"{dataset}: 5 documents, 10 sequences") and "2 of 8 codes occur" in lines[1]
    page = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    reds = np.argwhere((page == (255, 0, 0)).all(-1))
    assert len(reds) == 2 * 128 * 128  # documents 0 and 2, both red
    assert (page[reds[:, 0].max() + 2 :] == 0).all(-1).any(), "no caption below"


FAULTS = {
    "a flipped byte of the .bin": (
        lambda prefix: flip(Path(f"{prefix}.bin"), 5),
        "train.bin: bytes 0 to .* differ from",
    ),
    "a flipped byte of the .idx": (lambda prefix: flip(Path(f"{prefix}.idx"), 40), "train.idx: its SHA-256 is not the"),
    "a cut .bin": (lambda prefix: cut(Path(f"{prefix}.bin")), "train.bin: .* bytes, the manifest says"),
    "no .bin": (lambda prefix: Path(f"{prefix}.bin").unlink(), "train.bin: not found"),
    "another text tokenizer": (
        lambda prefix: flip(prefix.parent / "text.json", 9),
        "text.json: its SHA-256 is not the",
    ),
    "no image tokenizer": (
        lambda prefix: (prefix.parent / "image.safetensors").unlink(),
        "image.safetensors: cannot be read .* or pass --image-tokenizer",
    ),
    "wrong counts": (
        lambda prefix: write_file(Path(f"{prefix}.codebook.json"), CodebookUse(np.ones(CODES, np.int64)).content()),
        "train.codebook.json: its counts are not those of the tokens",
    ),
    "a directory for the .idx": (lambda prefix: folder_for(Path(f"{prefix}.idx")), "Is a directory: .*train.idx"),
    "a directory for the manifest": (lambda prefix: folder_for(Path(f"{prefix}.json")), "Is a directory: .*train.json"),
    "samples of the sources": (
        lambda prefix: change_manifest(prefix, sources=(Source("a", 3, size=1), Source("b", 1, size=1))),
        "train.json: sources have 4 samples, there are 5 documents",
    ),
    "pictures of another grid": (
        lambda prefix: change_manifest(prefix, image=dataclasses.replace(Manifest.read(prefix).image, grid=(2, 3))),
        "train.idx: document 0 is not a text sequence and an image of 2 x 3 codes",
    ),
    "a broken manifest": (lambda prefix: Path(f"{prefix}.json").write_text("{}"), "train.json: format_version is None"),
}


def folder_for(path: Path) -> None:
    path.unlink()
    path.mkdir()


def change_manifest(prefix: Path, **changed) -> None:
    dataclasses.replace(Manifest.read(prefix), **changed).write(prefix)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def test_every_fault_is_found_and_nothing_else(start, tokenizers, tmp_path):
    """One start of the tool for all of them: each in a folder of its own, one without a fault among them."""
    for number, (damage, _) in enumerate([*FAULTS.values(), (lambda prefix: None, "")]):
        (tmp_path / f"{number}").mkdir()
        damage(write(tmp_path / f"{number}" / "train", tokenizers))
    prefixes = [tmp_path / f"{number}" / "train" for number in range(len(FAULTS) + 1)]
    status, lines, _ = start("verify_data.py", *prefixes, "--grid", tmp_path / "grid.png")
    assert status == 1 and not (tmp_path / "grid.png").exists()
    for prefix, (fault, (_, message)) in zip(prefixes, FAULTS.items(), strict=False):
        found = [line for line in lines if line.startswith("FAULT ") and f"{prefix.parent}/" in line]
        assert any(re.search(message, line) for line in found), (fault, found)
        assert len(found) == (2 if fault == "a cut .bin" else 1), (fault, found)  # its size, and its last block
    assert not [line for line in lines if line.startswith("FAULT ") and f"{prefixes[-1].parent}/" in line]


def test_ids_outside_of_what_the_manifest_says(start, tmp_path, tokenizers):
    write(tmp_path / "outside", tokenizers, code=CODES)
    status, lines, _ = start("verify_data.py", tmp_path / "outside")
    assert status == 1 and f"FAULT {tmp_path}/outside.bin: image codes are 1 to 8, codebook_size is 8" in lines
    good = Manifest.read(tmp_path / "outside")
    wrong = dataclasses.replace(
        good, image=dataclasses.replace(good.image, max_code=5), tokens=TokenCounts(20, good.tokens.text)
    )
    wrong.write(tmp_path / "outside")
    said = "\n".join(start("verify_data.py", tmp_path / "outside")[1])
    assert "tokens says TokenCounts(text=20, image=" in said
    assert "image codes are 1 to 5, outside.bin has 1 to 8" in said


def test_a_store_without_a_manifest_has_its_structure_checked_alone(start, dataset):
    Path(f"{dataset}.json").unlink()
    status, lines, _ = start("verify_data.py", dataset)
    assert status == 0 and lines[0].endswith("; no manifest: only the structure was checked")
    flip(Path(f"{dataset}.idx"), 40)
    status, lines, _ = start("verify_data.py", dataset)
    assert status == 1 and len(lines) == 1 and "train.idx" in lines[0]


def test_merging_by_the_command_line(start, dataset, tmp_path, tokenizers):
    (tmp_path / "b").mkdir()
    other = write(tmp_path / "b" / "other", tokenizers)
    status, lines, _ = start("merge_data.py", dataset, other, "--output-prefix", tmp_path / "c" / "all")
    assert status == 0 and "2 datasets, 10 captioned images" in lines[0] and "2 of 8 codes occur" in lines[1]
    assert start("verify_data.py", tmp_path / "c" / "all", dataset)[0] == 0
    change_manifest(other, image=dataclasses.replace(Manifest.read(other).image, crop="pad"))
    status, _, errors = start("merge_data.py", dataset, other, "--output-prefix", tmp_path / "d" / "all")
    assert status == 1 and "merge_data.py: error: " in errors and "image.crop is pad" in errors
    status, _, errors = start("merge_data.py", tmp_path, "--output-prefix", tmp_path / "d" / "all")
    assert status == 1 and "job.json: not a job" in errors


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([[0, 1], [1, 0]], "train.idx: document 1 is not a text sequence and an image of 2 x 2 codes"),
        ([[0, 1], [0, 1, 1]], "train.idx: its documents are not a text sequence and an image each"),
        ([[0], [1, 0, 1]], "train.idx: document 1 is not a text sequence"),
        ([None, None], "train.idx: its documents are not a text sequence"),
    ],
)
def test_documents_that_are_not_captioned_images(verify_data, dataset, documents, message):
    """Every digest and number is right; only the form of the documents is not."""
    good = Manifest.read(dataset)
    for suffix in (".json", ".bin", ".idx", ".codebook.json"):
        Path(f"{dataset}{suffix}").unlink()
    with IndexedWriter(dataset, np.uint16) as writer:
        for modes in documents:
            writer.add_document([np.array([1, 2, 3, 4])] * len(modes or [0, 1]), modes)
    modes = sum((modes or [0, 0] for modes in documents), [])
    digests = {"index_sha256": writer.digests.index_sha256, "bin_blocks": writer.digests.bin_blocks}
    counts = TokenCounts(4 * modes.count(0), 4 * modes.count(1))
    text = dataclasses.replace(good.text, min_id=1, max_id=4)
    image = dataclasses.replace(good.image, **dict.fromkeys(("min_code", "max_code"), None))
    image = dataclasses.replace(image, min_code=1, max_code=4) if 1 in modes else image
    sources = (Source("a", 2, size=1),)
    dataclasses.replace(
        good, documents=2, sequences=len(modes), tokens=counts, text=text, image=image, sources=sources, **digests
    ).write(dataset)
    found = list(verify_data.faults(dataset, {"text": None, "image": None}))
    assert len(found) == 1 and message in found[0]


def test_a_missing_shard_is_one_fault_and_the_others_are_checked(start, tmp_path, tokenizers):
    folder = tmp_path / "train.shards"
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps({"shards": ["a.tar", "b.tar", "c.tar"]}))
    for name in ("000000", "000002"):
        write(folder / name, tokenizers)
        (folder / f"{name}.ledger.jsonl").touch()
    flip(folder / "000002.bin", 5)
    status, lines, _ = start("verify_data.py", folder)
    found = [line for line in lines if line.startswith("FAULT")]
    assert status == 1 and len(found) == 2 and any(line.startswith(f"{folder}/000000: 5 documents") for line in lines)
    assert "1 of 3 shards are not finished: 000001 (b.tar)" in found[0] and "000002.bin: bytes 0 to" in found[1]


def test_every_tokenizer_is_read_once(verify_data, tmp_path, tokenizers, monkeypatch):
    prefixes = [write(tmp_path / name, tokenizers) for name in "ab"]
    (tmp_path / "link").symlink_to(tmp_path)
    real, read = verify_data.file_sha256, []
    monkeypatch.setattr(
        verify_data, "digest_once", functools.cache(lambda path: (read.append(Path(path).name), real(path))[1])
    )
    for prefix in (*prefixes, tmp_path / "link" / "a"):
        assert not list(verify_data.faults(prefix, {"text": None, "image": None}))
    assert sorted(read) == ["image.safetensors", "text.json"]


def test_a_tokenizer_of_another_grid_is_a_fault_of_the_pictures(start, dataset, tmp_path, tokenizers):
    """Codes and manifest agree with each other: only decoding tells."""
    (tmp_path / "one").mkdir()
    one = write(tmp_path / "one" / "train", tokenizers)
    change_manifest(one, image=dataclasses.replace(Manifest.read(one).image, grid=(1, 4)))
    status, lines, _ = start("verify_data.py", one, "--grid", tmp_path / "grid.png")
    assert status == 1 and "its grid is (2, 2), the manifest" in lines[-1]
    status, lines, _ = start("verify_data.py", dataset, "--grid", tmp_path)
    assert status == 1 and lines[-1].startswith("FAULT ")
