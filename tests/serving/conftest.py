"""A tiny trained run of 16 rows of 16 codes, and real server processes over it."""

import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from server_process import Running

from megat2i.generate import Sampler
from megat2i.kernels import choose_ops
from megat2i.model.gpt import GPT
from megat2i.tokenizers.image import load_image_tokenizer
from megat2i.tokenizers.text import load_text_tokenizer

CONFIG = """
run: {{dir: {folder}/run}}
data: {{train: [{{prefix: {folder}/data/train}}], sequence_length: 300, caption_dropout: 0.1}}
model: {{hidden: 64, layers: 2, heads: 2, positions: rotary}}
training: {{steps: 3, global_batch_size: 4, micro_batch_size: 4, warmup_steps: 1}}
runtime: {{dtype: float32}}
sampling: {{temperature: 1.5}}
"""


@pytest.fixture(scope="session")
def run(repository, tmp_path_factory) -> Path:
    """Folder of a run, made by the command lines."""
    folder = tmp_path_factory.mktemp("serving")
    photos, generator = folder / "photos", random.Random(0)
    photos.mkdir()
    for number in range(12):
        color = tuple(generator.randrange(256) for _ in range(3))
        picture = Image.new("RGB", (32, 32), "white")
        picture.paste(color, (4, 4, 20 + number, 20 + number))
        picture.save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text(generator.choice(["red hut", "green square", "blue circle"]))
    (folder / "run.yaml").write_text(CONFIG.format(folder=folder))
    sizes = ("--train-text-tokenizer", "270", "--image-size", "16", "--patch-size", "1", "--codebook-size", "12")
    for command in (
        ("tools/preprocess_data.py", "--input", photos, "--output-prefix", folder / "data/train", *sizes),
        ("pretrain_t2i.py", "--config", folder / "run.yaml"),
    ):
        done = subprocess.run([sys.executable, *map(str, command)], cwd=repository, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="session")
def make_sampler(run_config, tiny_store, tmp_path_factory):
    """Function that makes a sampler of an untrained model with sharp predictions."""

    def make() -> Sampler:
        settings = run_config(tmp_path_factory.mktemp("run"))
        layout, ops = settings.vocab_layout, choose_ops(torch.device("cpu"), torch.float32)
        model = GPT(replace(settings.model, positions="rotary"), layout.size, layout.ranges, ops)
        model.initialise(0)
        model.requires_grad_(False)
        model.output.weight.mul_(3)
        text = load_text_tokenizer(tiny_store / "text.json")
        image = load_image_tokenizer(tiny_store / "image.safetensors")
        return Sampler(model, layout, text, image, settings.data.sequence_length, "text_to_image")

    return make


@pytest.fixture(scope="session")
def start_server(repository, run, tmp_path_factory):
    """Function of (arguments of tools/serve.py) -> Running; whatever still runs at the end is killed."""
    started = []

    def start(*arguments: str, folder: Path = run) -> Running:
        errors = tmp_path_factory.mktemp("server") / "errors.txt"
        started.append(Running(repository, folder, errors, *arguments))
        return started[-1]

    yield start
    for server in started:
        server.process.kill()
        server.process.communicate()


@pytest.fixture(scope="session")
def server(start_server) -> Running:
    """One server for all tests that do not stop it; nothing it was asked may have been an error of its own."""
    running = start_server()
    yield running
    assert running.stop() == 0
    assert running.errors.read_text() == ""
