"""What every trial starts from: a tiny dataset, configurations, and the untouched run of every variant."""

import functools
import hashlib
import json
import os
import random
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from megat2i.data.indexed import IndexedDataset, IndexedWriter
from megat2i.data.manifest import ImageContent, Manifest, Source, TextContent, TokenCounts

STEPS = 30
DOCUMENTS = 200  # several pages of a .bin: a file that ends early is met both within a page and beyond
TMPFS_MIB = 48  # of a trial's own file system: some ten times what it needs

CONFIG = """\
run: {{dir: {run}}}
data:
  train: [{{prefix: {data}}}]
  sequence_length: 32
  caption_dropout: 0.1
model: {{hidden: 32, layers: 2, heads: 2, ffn: 64, norm: rms_norm, positions: rotary, qk_norm: true}}
training: {{steps: {steps}, warmup_steps: 4, global_batch_size: 12, checkpoint_every: 2, keep_checkpoints: 3}}
optimizer: {{lr: 2.0e-3, min_lr: 1.0e-4}}
runtime: {{dtype: float32, device: cpu}}
"""


@dataclass(frozen=True)
class Variant:
    """An engine and a layout: the final state depends on both, down to the last bit."""

    engine: str
    ranks: int = 1
    tensor: int = 1
    pipeline: int = 1

    @property
    def name(self) -> str:
        data = self.ranks // self.tensor // self.pipeline
        return f"{self.engine}-pp{self.pipeline}-tp{self.tensor}-dp{data}"

    def overrides(self) -> list[str]:
        micro_batch = 12 * self.tensor * self.pipeline // self.ranks // self.pipeline  # a pipeline gets a few
        return [
            f"optimizer.engine={self.engine}",
            f"parallel.tensor={self.tensor}",
            f"parallel.pipeline={self.pipeline}",
            f"training.micro_batch_size={micro_batch}",
        ]


VARIANTS = (
    Variant("torch"),
    Variant("torch", 2),
    Variant("deepspeed", 2),
    Variant("torch", 4, tensor=2),
    Variant("deepspeed"),
    Variant("torch", 2, pipeline=2),
    Variant("torch", 3),
    Variant("deepspeed", 2, tensor=2),
    Variant("deepspeed", 4, pipeline=2),
)


@dataclass(frozen=True)
class Reference:
    """The untouched run: digest of every checkpoint by step, its metrics, and a folder with one of another run."""

    states: dict[int, str]
    metrics: list[dict]
    donor: Path

    @classmethod
    def read(cls, folder: Path) -> "Reference":
        content = json.loads((folder / "reference.json").read_text())
        return cls(
            {int(step): state for step, state in content["states"].items()}, content["metrics"], folder / "donor"
        )


def make_dataset(prefix: Path, seed: int = 0) -> None:
    """Write a store of random captions and codes with its manifest and what stands for its tokenizers."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    generator, digests = np.random.default_rng(seed), {}
    for name in ("text_tokenizer.json", "image_tokenizer.safetensors"):
        content = f"stands for the {name}".encode()
        (prefix.parent / name).write_bytes(content)
        digests[name] = hashlib.sha256(content).hexdigest()
    text_tokens = 0
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(DOCUMENTS):
            caption = generator.integers(0, 300, generator.integers(1, 9))
            text_tokens += len(caption)
            writer.add_document([caption, generator.integers(0, 64, 16)], [0, 1])
    text, image = digests
    Manifest(
        documents=DOCUMENTS,
        sequences=2 * DOCUMENTS,
        tokens=TokenCounts(text_tokens, 16 * DOCUMENTS),
        dtype="uint16",
        text=TextContent(300, 0, 299, text, "tokenizers", digests[text]),
        image=ImageContent(64, 0, 63, (4, 4), 32, "center", "float32", image, "patch", digests[image]),
        sources=(Source("soak", DOCUMENTS, size=1),),
        index_sha256=writer.digests.index_sha256,
        bin_blocks=writer.digests.bin_blocks,
    ).write(prefix)


def other_tokens(prefix: Path) -> bytes:
    """A .bin for the index of ``prefix`` in which every image code is another one."""
    store = IndexedDataset(prefix)
    image = np.repeat(store.modes, store.lengths) == 1
    tokens = np.fromfile(store.bin_path, store.dtype)
    return np.where(image, (tokens + 7) % 64, tokens).astype(store.dtype).tobytes()


def state(checkpoint: Path) -> str:
    """Digest of all values in a checkpoint's files: names, types, shapes and bytes of weights and moments."""
    digest = hashlib.sha256()
    for path in sorted(checkpoint.glob("*.safetensors")):
        for name, values in sorted(load_file(path).items()):
            digest.update(f"{path.name} {name} {values.dtype} {values.shape}".encode() + values.tobytes())
    return digest.hexdigest()


def metrics(run: Path) -> list[dict]:
    """The record of a run without what was measured in seconds. Raises ValueError where a line is not JSON."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in entry.items() if k != "mfu" and not k.endswith("_s")} for entry in entries]


@functools.cache
def can_mount() -> bool:
    """Whether this process may mount a file system: root may, but not in every container."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(mount_command(Path(folder)), stderr=subprocess.DEVNULL).returncode == 0
        if mounted:
            unmount(Path(folder))
    return mounted


def mount_command(folder: Path) -> list[str]:
    return ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_MIB}m", "soak", str(folder)]


def mount(folder: Path) -> None:
    """Put a small file system at ``folder``."""
    subprocess.run(mount_command(folder), check=True)


def unmount(folder: Path) -> None:
    """Let go of the file system at ``folder``, also where a file of it is still open."""
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def scratch(parent: Path | None) -> Path:
    """A new folder for the campaign, in memory where there is such a file system: processes die here, not machines."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="soak-", dir=parent or (memory if os.access(memory, os.W_OK) else None)))


def generator(seed: int, *key: object) -> random.Random:
    return random.Random(repr((seed, *key)))
