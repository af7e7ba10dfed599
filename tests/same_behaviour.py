"""What the program computes, as digests: two versions of it behave alike where their records are equal.

    python tests/same_behaviour.py --against COMMIT      # runs that commit and the working tree, and compares
    python tests/same_behaviour.py --record FILE         # writes the record of this tree

A record holds the SHA-256 of a tokenized dataset, of 8 sampled images, and of the losses and every checkpoint tensor of
30 float32 steps under plain Python and under DeepSpeed's launcher with 1 and 4 ranks. Digests differ from processor to
processor, so both versions run on this one. Each version brings its own copy of this file, with its own names of keys.
"""

import argparse
import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
STEPS = 30
COLORS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 220)}
SHAPES = ("circle", "square")
TIMES = ("tokens_per_s", "step_s", "mfu")
CONFIG = """
run: {{dir: {run_dir}}}
data:
  train: [{{prefix: {data}}}]
  valid: {data}
  sequence_length: 40
  caption_dropout: 0.1
model: {{hidden: 64, layers: 4, heads: 4, kv_heads: 2, positions: rotary, qk_norm: true}}
training:
  steps: {steps}
  global_batch_size: 16
  micro_batch_size: 2
  warmup_steps: 10
  evaluate_every: 15
  evaluate_samples: 32
optimizer: {{lr: 5.0e-3, min_lr: 5.0e-4, clip: 1.0}}
runtime: {{dtype: float32, self_test: false}}
"""
ONE_RANK = ()
FOUR_STAGES = ("parallel.pipeline=2", "parallel.tensor=2", "parallel.sequence=true")
ZERO_BUBBLE = ("parallel.pipeline=4", "parallel.schedule=zero_bubble")
INTERLEAVED = ("parallel.pipeline=2", "parallel.schedule=interleaved", "parallel.virtual_stages=2")
# {name: (ranks under DeepSpeed's launcher, None: plain Python; overrides)}
RUNS = {
    "python": (None, ONE_RANK),
    "python, recomputed": (None, ("parallel.recompute=selective", "model.norm=layer_norm")),
    "deepspeed 1.1.1": (1, ONE_RANK),
    "deepspeed 2.2.1": (4, FOUR_STAGES),
    "deepspeed 1.1.4": (4, ()),
    "deepspeed 4.1.1 zero bubble": (4, ZERO_BUBBLE),
    "deepspeed 2.1.2 interleaved": (4, INTERLEAVED),
}


def draw_images(folder: Path) -> None:
    """160 captioned images of 32 x 32 pixels, the same ones always."""
    folder.mkdir(parents=True)
    generator = random.Random(0)
    for number in range(160):
        color = generator.choice(list(COLORS))
        shape = generator.choice(SHAPES)
        image = Image.new("RGB", (32, 32), "white")
        low, high = generator.randint(3, 6), generator.randint(25, 28)
        canvas = ImageDraw.Draw(image)
        paint = canvas.ellipse if shape == "circle" else canvas.rectangle
        paint((low, low, high, high), fill=COLORS[color])
        image.save(folder / f"{number:03}.png")
        (folder / f"{number:03}.txt").write_text(f"a {color} {shape}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(*command) -> None:
    """Run ``command`` with one thread a process; exits with its output where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONHASHSEED": "0"}
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(words)} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def record_dataset(folder: Path) -> dict[str, str]:
    draw_images(folder / "images")
    prefix = folder / "data/train"
    fitted = ("--train-text-tokenizer", 300, "--image-size", 16, "--patch-size", 4, "--codebook-size", 32)
    tool = (sys.executable, ROOT / "tools/preprocess_data.py")
    run(*tool, "--input", folder / "images", "--output-prefix", prefix, "--workers", 1, *fitted)
    files = [*sorted(prefix.parent.glob("*.bin")), *sorted(prefix.parent.glob("*.idx"))]
    files += [prefix.parent / "text_tokenizer.json", prefix.parent / "image_tokenizer.safetensors"]
    return {f"dataset {path.name}": digest(path.read_bytes()) for path in files}


def record_run(folder: Path, name: str) -> dict[str, str]:
    """Train as RUNS[name] says; digests of the metrics and of the last checkpoint's tensors."""
    ranks, overrides = RUNS[name]
    run_dir = folder / name.replace(" ", "-").replace(",", "")
    config = run_dir.with_suffix(".yaml")
    config.write_text(CONFIG.format(run_dir=run_dir, data=folder / "data/train", steps=STEPS))
    launcher = [sys.executable]
    if ranks:
        deepspeed = Path(sys.executable).with_name("deepspeed")
        launcher = [deepspeed, "--quiet", "--num_accelerators", ranks, "--master_port", free_port()]
    run(*launcher, ROOT / "pretrain_t2i.py", "--config", config, *overrides)

    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "split" not in line]
    assert steps == list(range(1, STEPS + 1)), steps
    values = [{key: line[key] for key in sorted(line) if key not in TIMES} for line in lines]
    record = {f"{name}: metrics": digest(json.dumps(values).encode())}
    for path in sorted((run_dir / f"checkpoints/step-{STEPS}").glob("**/*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for key in sorted(file.keys()):
                record[f"{name}: {path.name} {key}"] = digest(file.get_tensor(key).tobytes())
    return record


def record_samples(folder: Path) -> dict[str, str]:
    """Eight images that the run "python" draws."""
    output = folder / "samples"
    prompts = ("a red circle", "a blue square", "a green circle", "a red square")
    tool = (sys.executable, ROOT / "tools/generate.py", "--run", folder / "python", "--output", output)
    run(*tool, "--prompts", *prompts, "--images-per-prompt", 2)
    images = sorted(output.glob("[0-9]*.png"))  # not grid.png
    assert len(images) == 8, images
    return {f"sample {path.name}": digest(Image.open(path).convert("RGB").tobytes()) for path in images}


def make_record(folder: Path) -> dict[str, str]:
    """{what: SHA-256} of this tree."""
    record = record_dataset(folder)
    for name in RUNS:
        print(f"  {name}", flush=True)
        record |= record_run(folder, name)
    return record | record_samples(folder)


def differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """A line for everything that is not in both records with one digest."""
    missing = [f"gone: {key}" for key in sorted(before.keys() - after.keys())]
    added = [f"new: {key}" for key in sorted(after.keys() - before.keys())]
    changed = [f"changed: {key}" for key in sorted(before.keys() & after.keys()) if before[key] != after[key]]
    return missing + added + changed


def copy_tree(commit: str | None, target: Path) -> None:
    """The files of ``commit``, or of the working tree, laid out so that no installed package is imported instead."""
    target.mkdir(parents=True)
    if commit is None:
        names = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listing = subprocess.run(names, cwd=ROOT, check=True, capture_output=True).stdout
        listed = b"\0".join(name for name in listing.split(b"\0") if name and (ROOT / os.fsdecode(name)).is_file())
        archive = ["tar", "--create", "--null", "--files-from=-"]
        content = subprocess.run(archive, cwd=ROOT, check=True, capture_output=True, input=listed).stdout
    else:
        content = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "--extract", "--directory", target], input=content, check=True)
    (target / "kernels").rename(target / "megat2i/kernels")


def record_of(commit: str | None, folder: Path) -> dict[str, str]:
    """The record that a copy of ``commit`` (None: of the working tree) makes of itself."""
    tree, file = folder / "tree", folder / "record.json"
    copy_tree(commit, tree)
    environment = os.environ | {"PYTHONPATH": str(tree)}
    command = [sys.executable, tree / "tests/same_behaviour.py", "--record", file]
    subprocess.run(command, env=environment, cwd=folder, check=True)
    return json.loads(file.read_text())


def compare(commit: str) -> None:
    """Exit with the differences between ``commit`` and the working tree."""
    with tempfile.TemporaryDirectory(prefix="same-behaviour-") as name:
        print(f"{commit}:", flush=True)
        before = record_of(commit, Path(name) / "before")
        print("working tree:", flush=True)
        after = record_of(None, Path(name) / "after")
    lines = differences(before, after)
    if lines:
        sys.exit("\n".join([f"{len(lines)} of {len(before)} digests differ from {commit}:", *lines[:40]]))
    print(f"all {len(before)} digests are those of {commit}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--against", metavar="COMMIT")
    task.add_argument("--record", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.against:
        compare(arguments.against)
        return
    with tempfile.TemporaryDirectory(prefix="record-") as name:
        record = make_record(Path(name))
    arguments.record.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
