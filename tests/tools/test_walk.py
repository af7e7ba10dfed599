"""The way of the README from a folder of pictures to pictures from prompts, by the command lines alone."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

COLORS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 220)}
SHAPES = ("circle", "square")
CONFIG = """
run: {{dir: {run}}}
data:
  train: [{{prefix: {data}}}]
  sequence_length: 40
  caption_dropout: 0.1
model: {{hidden: 64, layers: 2, heads: 2, positions: rotary}}
training: {{steps: 120, global_batch_size: 16, micro_batch_size: 16, warmup_steps: 10, sample_every: 120}}
optimizer: {{lr: 5.0e-3, min_lr: 5.0e-4}}
runtime: {{dtype: float32}}
sampling: {{prompts: [red circle], temperature: 0.1}}
"""


def tool(repository: Path, name: str, *arguments) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(repository / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def walked(repository, tmp_path_factory):
    """Folder with photos/, data/ and run/, made as a user would."""
    folder = tmp_path_factory.mktemp("walk")
    draw_photos(folder / "photos")
    made = tool(
        repository, "tools/preprocess_data.py", "--input", folder / "photos", "--output-prefix", folder / "data/train",
        "--train-text-tokenizer", 300, "--image-size", 16, "--patch-size", 4, "--codebook-size", 32,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    (folder / "run.yaml").write_text(CONFIG.format(run=folder / "run", data=folder / "data/train"))
    trained = tool(repository, "pretrain_t2i.py", "--config", folder / "run.yaml")
    assert trained.returncode == 0, trained.stderr
    return folder


def draw_photos(folder: Path) -> None:
    folder.mkdir()
    generator = random.Random(0)
    for number in range(120):
        color, shape = generator.choice(list(COLORS)), generator.choice(SHAPES)
        picture = Image.new("RGB", (32, 32), "white")
        low, high = generator.randint(3, 6), generator.randint(25, 28)
        paint = ImageDraw.Draw(picture)
        (paint.ellipse if shape == "circle" else paint.rectangle)((low, low, high, high), fill=COLORS[color])
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"{color} {shape}")


def generate(repository, folder, *arguments, output="out"):
    return tool(repository, "tools/generate.py", "--run", folder / "run", "--output", folder / output, *arguments)


def test_pictures_have_the_colour_of_their_prompts(repository, walked):
    prompts = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    drawn = generate(repository, walked, "--prompts", *prompts)
    assert drawn.returncode == 0, drawn.stderr
    lines = [json.loads(line) for line in (walked / "out/samples.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == prompts and all(line["temperature"] == 0.1 for line in lines)
    right = 0
    for line in lines:
        middle = Image.open(walked / "out" / line["file"]).crop((6, 6, 10, 10)).resize((1, 1)).getpixel((0, 0))
        distances = {
            name: sum((a - b) ** 2 for a, b in zip(middle, color, strict=True)) for name, color in COLORS.items()
        }
        right += min(distances, key=distances.get) == line["prompt"].split()[0]
    assert right >= 5, f"{right} of 6 pictures have the right colour; chance gives 2"
    assert Image.open(walked / "out/grid.png").width > 6 * 100


def test_a_picture_does_not_depend_on_its_company(repository, walked):
    several = generate(repository, walked, "--prompts", "red circle", "blue square", "--temperature", 1, output="two")
    alone = generate(repository, walked, "--prompts", "blue square", "--temperature", 1, output="one")
    other = generate(repository, walked, "--prompts", "blue square", "--temperature", 1, "--seed", 7, output="seed")
    assert several.returncode == alone.returncode == other.returncode == 0, several.stderr + alone.stderr
    picture = (walked / "one/00000-blue-square-0.png").read_bytes()
    assert (walked / "two/00001-blue-square-0.png").read_bytes() == picture
    assert (walked / "seed/00000-blue-square-7.png").read_bytes() != picture, "the seed changes nothing"


def test_the_run_is_recorded(walked):
    environment = json.loads((walked / "run/environment.json").read_text())
    assert environment["engine"] == "torch" and environment["layout"] == "1.1.1"
    losses = [json.loads(line)["loss/image"] for line in (walked / "run/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 120 and losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "no prompts"),
        (("--prompts", "x", "--temperature", "0"), "sampling.temperature"),
        (("--prompts", "x", "--top-p", "2"), "sampling.top_p"),
        (("--prompts", "x", "--images-per-prompt", "0"), "--images-per-prompt"),
    ],
)
def test_wrong_arguments_are_one_line(repository, walked, arguments, words):
    refused = generate(repository, walked, *arguments, output="refused")
    assert refused.returncode != 0 and words in refused.stderr
    assert refused.stderr.count("\n") == 1 and not (walked / "refused").exists()


def test_a_folder_without_a_run_is_one_line(repository, tmp_path):
    refused = tool(repository, "tools/generate.py", "--run", tmp_path, "--prompts", "x")
    assert refused.returncode != 0 and "config.yaml" in refused.stderr and refused.stderr.count("\n") == 1


def test_guidance_needs_empty_captions_in_training(repository, walked):
    settings = (walked / "run/config.yaml").read_text()
    (walked / "run/config.yaml").write_text(settings.replace("caption_dropout: 0.1", "caption_dropout: 0.0"))
    try:
        refused = generate(repository, walked, "--prompts", "red circle", "--guidance", 3, output="refused")
        forced = generate(repository, walked, "--prompts", "red circle", "--guidance", 3, "--force", output="forced")
    finally:
        (walked / "run/config.yaml").write_text(settings)
    lines = [line for line in refused.stderr.splitlines() if not line.endswith("so far")]  # progress, on a slow machine
    assert refused.returncode != 0 and len(lines) == 1 and "caption_dropout" in lines[0]
    assert forced.returncode == 0, forced.stderr
