"""tools/evaluate.py as it is called: records on the disk, a short table, and one line for what cannot be measured."""

import json
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from megat2i.evaluate.quality import measure_fid
from megat2i.tokenizers.patch import PatchTokenizer


@pytest.fixture
def evaluate(repository, tmp_path, monkeypatch, capsys):
    """Function of arguments -> (what the tool exits with, what it prints), called within this process."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments) -> tuple[str | int, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        try:
            runpy.run_path(str(repository / "tools" / "evaluate.py"), run_name="__main__")
        except SystemExit as left:
            return left.code, capsys.readouterr().out
        return 0, capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folders ``one`` and ``other`` with 12 pictures of 16 x 16 pixels each."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for name, darkest in (("one", 0), ("other", 100)):
        (root / name).mkdir()
        for number in range(12):
            small = generator.integers(darkest, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(small).resize((16, 16)).save(root / name / f"{number:02d}.png")
    return root


def test_fid(repository, evaluate, pictures, tmp_path):
    one, other = pictures / "one", pictures / "other"
    arguments = ("fid", "--generated", one, "--protocol", "nano", "--replicates", 5)
    saved = ("--reference", other, "--save-features", "kept/f.npz", "--output", "new/first.json")
    command = [sys.executable, repository / "tools" / "evaluate.py", *arguments, *saved]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record, out = json.loads((tmp_path / "new/first.json").read_text()), done.stdout
    assert record == measure_fid(one, other, "nano", replicates=5)
    assert f"{record['fid']:.4f}   95%: " in out and "not Inception" in out and "12 against 12" in out
    assert out.count("warning: ") == 2 and out.count("\n") < 12
    code, _ = evaluate(*arguments, "--reference", "kept/f.npz", "--output", "second.json")
    assert code == 0 and json.loads((tmp_path / "second.json").read_text())["fid"] == record["fid"]


def test_reconstruction(evaluate, pictures, tmp_path):
    images = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in (pictures / "one").iterdir()])
    tokenizer = PatchTokenizer.fit(images.permute(0, 3, 1, 2).contiguous(), 4, 20)
    tokenizer.save(tmp_path / "image.safetensors")
    arguments = ("reconstruction", "--images", pictures / "one", "--protocol", "nano", "--output", "r.json")
    code, out = evaluate(*arguments, "--image-tokenizer", "image.safetensors")
    assert code == 0
    record = json.loads((tmp_path / "r.json").read_text())
    assert f"psnr                {record['psnr']:.4f}" in out and "of 20 codes, perplexity" in out
    assert record["image_tokenizer"]["sha256"] == tokenizer.sha256


def test_reconstruction_by_a_datasets_tokenizer(evaluate, pictures, tiny_store, tmp_path):
    """The tokenizer and the crop that its manifest names, and its own codebook use beside that of the images."""
    for name in ("train.idx", "train.bin", "train.json"):
        (tmp_path / name).write_bytes((tiny_store / name).read_bytes())
    images = torch.randint(0, 256, (30, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    PatchTokenizer.fit(images, 4, 40).save(tmp_path / "image.safetensors")
    arguments = ("reconstruction", "--images", pictures / "one", "--protocol", "nano", "--output", "r.json")
    code, _ = evaluate(*arguments, "--data", "train")
    assert "train.codebook.json" in code and "\n" not in code
    counts = {"codebook_size": 40, "used": 33, "perplexity": 21.5, "counts": [1] * 40}
    (tmp_path / "train.codebook.json").write_text(json.dumps(counts))
    code, out = evaluate(*arguments, "--data", "train")
    assert code == 0
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["codebook_of_dataset"]["used"] == 33 and "33 of 40 codes, perplexity 22" in out
    assert record["image_tokenizer"]["image_size"] == 16


def test_what_cannot_be_measured_is_one_line(evaluate, pictures, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.png").write_bytes(b"no picture")
    (tmp_path / "w.pth").write_bytes(b"no weights")
    output = ("--output", tmp_path / "x.json")
    fid = ("fid", "--generated", pictures / "one", *output, "--reference")
    clip = ("clip-score", "--generated", pictures / "one", "--clip", tmp_path, *output)
    copies = ("reconstruction", "--images", pictures / "one", "--protocol", "nano", *output)
    for arguments, words in (
        ((*fid, broken, "--protocol", "nano"), "a.png: cannot be measured"),
        ((*fid, tmp_path / "none", "--protocol", "nano"), "none: no such folder"),
        ((*fid, pictures / "other", "--protocol", "clean-fid"), "as --inception"),
        ((*fid, pictures / "other", "--protocol", "clean-fid", "--inception", tmp_path / "w.pth"), "w.pth: "),
        (clip, "no prompts"),
        ((*copies, "--image-tokenizer", tmp_path / "w.pth"), "w.pth: not an image tokenizer's file"),
        ((*copies, "--data", tmp_path / "none"), "none: says nothing of images"),
    ):
        sentence, _ = evaluate(*arguments)
        assert sentence.startswith("error: ") and words in sentence and "\n" not in sentence, (arguments, sentence)
    for wrong in (("--replicates", "1"), ("--batch-size", "0"), ("--protocol", "coco")):
        assert evaluate(*fid, pictures / "other", "--protocol", "nano", *wrong)[0] == 2
    assert not (tmp_path / "x.json").exists()
