"""The demo from data to pictures: ``make demo``, or ``python tools/demo.py``.

Runs the project's own commands one after another and prints them: data preparation, training, the report. What is
complete already is not done again, and a training run that was interrupted is resumed.
"""

import os
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from megat2i.interrupt import EXIT_CODE, INTERRUPTED, end_with_parent, said_on_interrupt

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
    """Train, or continue what is there: one process, with DeepSpeed's engine and without its launcher."""
    command = [sys.executable, "pretrain_t2i.py", "--config", CONFIG, "optimizer.engine=deepspeed"]
    if (RUN / "config.yaml").exists():
        command.append("--resume")
    run("Training", *command)
    if (RUN / INTERRUPTED).exists():
        sys.exit("the training was asked to end before its last step; `make demo` goes on from there")


def run(title: str, *command: str) -> None:
    print(f"\n== {title}: {shlex.join(command)}", flush=True)
    began = time.monotonic()
    code = wait_for_its_end(subprocess.Popen(command, preexec_fn=end_with_parent))
    if code == EXIT_CODE:
        sys.exit(code)  # it has said what there is to say
    if code:
        sys.exit(
            f"error: '{title}' failed with exit code {code}; `make demo` goes on from there once it is mended. What "
            f"another version of the demo left must be removed first: {DATA} and {RUN}"
        )
    print(f"   {title}: {time.monotonic() - began:.0f} s", flush=True)


def wait_for_its_end(process: subprocess.Popen) -> int:
    """Its exit code. Ctrl-C reaches the process too, which may need a while to save, and raises KeyboardInterrupt."""
    try:
        return process.wait()
    except KeyboardInterrupt:
        while process.poll() is None:
            with suppress(KeyboardInterrupt):
                process.wait()
        raise


if __name__ == "__main__":
    with said_on_interrupt("the demo was interrupted; `make demo` goes on where it was"):
        main()
