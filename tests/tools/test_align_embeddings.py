"""tools/align_embeddings.py from drawn pictures to a training run that starts from what it wrote."""

import json
import math
import multiprocessing
import random
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import plain_models
import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image, ImageDraw

from megat2i import checkpoint, config

pytestmark = pytest.mark.slow

COLOURS = ("red", "green", "blue", "black", "yellow", "gray", "cyan", "magenta", "orange", "pink", "brown", "purple")
CODES = len(COLOURS) + 1  # patches of one colour, and white ones
PAIRS, STEPS = 32, 80
MODEL = {"hidden": 64, "layers": 1, "heads": 2, "ffn": 64}
TABLE, FILE = "tok_embeddings.weight", "image_embeddings.safetensors"


def draw(folder: Path, count: int, seed: int) -> None:
    """Pictures of four coloured patches on white, somewhere, and captions that name the colours in any order."""
    folder.mkdir()
    generator = random.Random(seed)
    for number in range(count):
        colours = generator.sample(COLOURS, 4)
        picture = Image.new("RGB", (24, 24), "white")
        paint = ImageDraw.Draw(picture)
        for place, colour in zip(generator.sample(range(9), 4), colours, strict=True):
            x, y = 8 * (place % 3), 8 * (place // 3)
            paint.rectangle((x, y, x + 7, y + 7), fill=colour)
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(" and ".join(generator.sample(colours, 4)))


def call(script: Path, *arguments) -> subprocess.CompletedProcess:
    """Run ``script`` as a process of its own, forked, so that torch is imported once."""
    with tempfile.TemporaryDirectory() as folder:
        process = multiprocessing.get_context("fork").Process(target=_run, args=(script, arguments, Path(folder)))
        process.start()
        process.join(timeout=120)
        process.kill()
        out, err = ((Path(folder) / name).read_text() for name in ("out", "err"))
    return subprocess.CompletedProcess(script, process.exitcode, out, err)


def _run(script: Path, arguments, folder: Path) -> None:
    for name in ("out", "err"):
        setattr(sys, f"std{name}", open(folder / name, "w", buffering=1))  # noqa: SIM115 (for the rest of the process)
    sys.argv = [str(script), *map(str, arguments)]
    runpy.run_path(str(script), run_name="__main__")


@pytest.fixture(scope="module")
def aligned(repository, tmp_path_factory):
    """Folder with data/, lm/, alignment.yaml and run/ with its control."""
    import torch._dynamo  # noqa: F401 (slow, and optimizers load it: here once instead of in every process)

    folder = tmp_path_factory.mktemp("align")
    for split, count, text in (("train", 300, ("--train-text-tokenizer", 320)), ("valid", 60, None)):
        draw(folder / split, count, seed=count)
        image = ("--image-size", 24, "--patch-size", 8, "--codebook-size", CODES)
        if split == "valid":
            text = ("--text-tokenizer", folder / "data/text_tokenizer.json")
            image = ("--image-tokenizer", folder / "data/image_tokenizer.safetensors")
        made = call(
            repository / "tools/preprocess_data.py", "--input", folder / split, "--output-prefix",
            folder / "data" / split, "--workers", 1, *text, *image,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
    manifest = json.loads((folder / "data/train.json").read_text())
    plain_models.save(folder / "lm", config.ModelConfig(**MODEL), manifest["text"]["vocab_size"])
    content = {
        "run": {"dir": str(folder / "run")},
        "data": {"train": [{"prefix": str(folder / "data/train")}], "valid": str(folder / "data/valid"),
                 "sequence_length": 40},
        "model": MODEL | {"pretrained": str(folder / "lm")},
        "training": {"steps": STEPS, "global_batch_size": PAIRS, "micro_batch_size": PAIRS, "warmup_steps": 5,
                     "checkpoint_every": 30},
        "optimizer": {"engine": "torch", "lr": 0.01, "min_lr": 0.001, "weight_decay": 0.0},
        "runtime": {"device": "cpu", "dtype": "float32"},
    }  # fmt: skip
    (folder / "alignment.yaml").write_text(yaml.safe_dump(content))
    done = align(repository, folder)
    assert done.returncode == 0, done.stderr
    return folder


def align(repository, folder, *arguments):
    return call(repository / "tools/align_embeddings.py", "--config", folder / "alignment.yaml", *arguments)


def entries(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "split" not in line]


def test_the_curves_fall_and_only_true_pairs_generalise(aligned):
    for folder in (aligned / "run", aligned / "run/control"):
        curve = entries(folder)
        assert [entry["step"] for entry in curve] == list(range(1, STEPS + 1))
        assert curve[0]["loss"] > 0.7 * math.log(PAIRS) and curve[0]["temperature"] == pytest.approx(0.07, rel=0.01)
        assert curve[-1]["temperature"] != curve[0]["temperature"]
    assert entries(aligned / "run")[-1]["loss"] < 0.3 * math.log(PAIRS)
    retrieval = json.loads((aligned / "run/nearest_tokens.json").read_text())["retrieval"]
    true, control = retrieval["aligned"], retrieval["shuffled"]
    assert true["pairs"] == control["pairs"] == 60 and true["chance"] == 2 / 60
    assert true["pictures_found_caption"] > 30 and control["pictures_found_caption"] < 10
    assert retrieval["tests"]["aligned against shuffled"]["p"] < 1e-6
    assert true["loss"] < control["loss"]


def test_the_table_of_tokens_is_of_the_written_embeddings(aligned):
    found = json.loads((aligned / "run/nearest_tokens.json").read_text())
    assert set(found["nearest_tokens"]) == {"aligned", "shuffled", "random"}
    assert set(found["word_like"]["tests"]) == {"aligned against shuffled", "aligned against random"}
    text = safetensors.torch.load_file(aligned / "lm/model.safetensors")[TABLE]
    for name, folder in (("aligned", "run"), ("shuffled", "run/control")):
        rows = safetensors.torch.load_file(aligned / folder / FILE)[TABLE]
        for entry in found["nearest_tokens"][name][:5]:
            best = torch.cosine_similarity(rows[entry["code"]], text).max().item()
            assert entry["tokens"][0]["cosine"] == pytest.approx(best, abs=1e-4)


def test_a_run_starts_from_the_aligned_embeddings(repository, aligned):
    settings = yaml.safe_load((aligned / "alignment.yaml").read_text())
    settings["run"]["dir"] = str(aligned / "t2i")
    settings["model"] |= {"expansion": "file", "expansion_file": str(aligned / "run" / FILE)}
    settings["training"] = {"steps": 1, "global_batch_size": 4, "micro_batch_size": 4}
    settings["optimizer"] = {"lr": 0.0, "min_lr": 0.0}  # the weights stay where they start
    (aligned / "t2i.yaml").write_text(yaml.safe_dump(settings))
    done = call(repository / "pretrain_t2i.py", "--config", aligned / "t2i.yaml")
    assert done.returncode == 0, done.stderr
    settings, saved = config.load(aligned / "t2i/config.yaml"), checkpoint.latest_here(aligned / "t2i/checkpoints")
    manifest = json.loads((aligned / "data/train.json").read_text())
    first = config.VocabLayout(manifest["text"]["vocab_size"], CODES).image_start
    rows = safetensors.torch.load_file(aligned / "run" / FILE)[TABLE]
    assert torch.equal(checkpoint.read_tensor(saved, TABLE)[first : first + CODES], rows)
    assert settings.model.expansion == "file"
    assert not torch.equal(checkpoint.read_tensor(saved, "output.weight")[first : first + CODES], rows)


def test_a_resumed_alignment_ends_alike(repository, aligned, tmp_path):
    """Stopped in the middle, and stopped between the two trainings."""
    for number, left_out in enumerate(((FILE, "control", f"step-{STEPS}"), ("control",))):
        folder = tmp_path / str(number)
        ignored = shutil.ignore_patterns("nearest_tokens.json", *left_out)
        shutil.copytree(aligned / "run", folder, ignore=ignored)
        done = align(repository, aligned, "--resume", f"run.dir={folder}")
        assert done.returncode == 0, done.stderr
        assert ("resuming after step 60" in done.stdout) == (FILE in left_out)
        for name in (FILE, f"control/{FILE}", "nearest_tokens.json"):
            assert (folder / name).read_bytes() == (aligned / "run" / name).read_bytes(), name


def test_what_does_not_fit_is_one_line(repository, aligned, tmp_path):
    plain_models.save(tmp_path / "other", config.ModelConfig(**MODEL), 100)
    for arguments, words in (
        ((f"model.pretrained={tmp_path / 'other'}",), "100 vocabulary rows and the data's text tokenizer"),
        (("model.pretrained=null",), "model.pretrained is not set"),
        (("--resume", f"run.dir={aligned / 'run'}", "optimizer.lr=0.5"), "was started otherwise"),
    ):
        refused = align(repository, aligned, f"run.dir={tmp_path / 'refused'}", *arguments)
        assert refused.returncode != 0 and words in refused.stderr and refused.stderr.count("\n") == 1
        assert not (tmp_path / "refused").exists()


@pytest.mark.full
def test_two_ranks_align_alike(repository, aligned, tmp_path):
    launcher = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(repository / "tools/align_embeddings.py"), "--config", str(aligned / "alignment.yaml"),
               f"run.dir={tmp_path / 'run'}", f"training.micro_batch_size={PAIRS // 2}"]  # fmt: skip
    for resume in ((), ("--resume",)):
        done = subprocess.run([*command, *resume], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    for folder in ("", "control"):
        for found, expected in zip(entries(tmp_path / "run" / folder), entries(aligned / "run" / folder), strict=True):
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
            assert found["temperature"] == pytest.approx(expected["temperature"], rel=1e-3)
    assert (tmp_path / "run/nearest_tokens.json").exists()
