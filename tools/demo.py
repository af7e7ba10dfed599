"""The demo from data to pictures: ``make demo``, or ``python tools/demo.py``.

Runs the project's own commands one after another and prints them: data preparation, training, the report. What is
complete already is not done again, and a training run that was interrupted is resumed.
"""

import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/openmoji_demo.yaml"
RUN = Path("runs/demo")
DATA = Path("data/openmoji")
# Why these sizes: the comments in the configuration.
TOKENIZERS = ("--train-text-tokenizer", "1024", "--image-tokenizer", "patch", "--image-size", "48")
PATCHES = ("--patch-size", "8", "--codebook-size", "3072")


def main() -> None:
    """Prepare, train, report."""
    started = time.monotonic()
    os.chdir(ROOT)
    # The environment's own deepspeed and ninja, whether or not it was activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    prepare()
    train()
    run("The report", sys.executable, "examples/openmoji/report.py", "--run", str(RUN))
    files = ", ".join(("samples.png", "curves.png", "quality.json", "drawn", "metrics.jsonl", "tensorboard"))
    print(f"\nThe demo took {(time.monotonic() - started) / 60:.1f} minutes. In {RUN}: {files}")
    print(f"The page to look at: {RUN / 'report.html'}")


def prepare() -> None:
    """Shards of the training and the held-out pictures; the tokenizers are fitted on the training pictures alone."""
    preprocess = (sys.executable, "tools/preprocess_data.py", "--input", "openmoji")
    if not Path(f"{DATA}/train.json").exists():
        output = ("--split", "small-train", "--output-prefix", f"{DATA}/train")
        run("Training data", *preprocess, *output, *TOKENIZERS, *PATCHES)
    if not Path(f"{DATA}/valid.json").exists():
        output = ("--split", "small-valid", "--output-prefix", f"{DATA}/valid")
        tokenizers = ("--text-tokenizer", f"{DATA}/text_tokenizer.json")
        tokenizers += ("--image-tokenizer", f"{DATA}/image_tokenizer.safetensors")
        run("Held-out data", *preprocess, *output, *tokenizers)


def train() -> None:
    """Train, or continue what is there."""
    if shutil.which("nvidia-smi") is None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns twice that it finds no accelerator
    launcher = ["deepspeed", "--quiet", "--num_accelerators", "1", "--master_port", str(free_port())]
    command = [*launcher, "pretrain_t2i.py", "--config", CONFIG]
    if (RUN / "config.yaml").exists():
        command.append("--resume")
    run("Training", *command)


def free_port() -> int:
    """A port that nothing uses now: the launcher's own choice, 29500, is taken while another run is under way."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(title: str, *command: str) -> None:
    print(f"\n== {title}: {shlex.join(command)}", flush=True)
    began = time.monotonic()
    code = subprocess.run(command).returncode
    if code:
        sys.exit(f"error: '{title}' failed with exit code {code}; `make demo` goes on from there once it is mended")
    print(f"   {title}: {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
