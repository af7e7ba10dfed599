"""Small corpora of captioned images, tokenizers for them, and ways to run the preprocessing engine on them."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import megat2i.data.preprocess as engine
from megat2i.data.encode_part import Encoding
from megat2i.data.sources import find_parts
from megat2i.tokenizers.patch import PatchTokenizer
from megat2i.tokenizers.text import train_text_tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
OUTPUTS = (".bin", ".idx", ".json", ".ledger.jsonl", ".codebook.json")
SIZE = 16


def picture(number: int, size=(20, 16)) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def caption(number: int) -> str:
    return f"picture number {number} with {['red', 'blue', 'green'][number % 3]}"


def write_images(folder: Path, count: int, size=(20, 16)) -> Path:
    """A JSONL file of ``count`` captioned images."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture(number, size).save(folder / f"{number:04d}.png")
    rows = [json.dumps({"image": f"{number:04d}.png", "caption": caption(number)}) for number in range(count)]
    (folder / "captions.jsonl").write_text("\n".join(rows))
    return folder / "captions.jsonl"


def write_shards(folder: Path, shards: int, images: int) -> list[Path]:
    """WebDataset shards: each is one part of the work, whatever its size."""
    folder.mkdir()
    for shard in range(shards):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for number in range(shard * images, (shard + 1) * images):
                buffer = io.BytesIO()
                picture(number, (640, 480)).save(buffer, "PNG", compress_level=1)
                for suffix, content in ((".png", buffer.getvalue()), (".txt", caption(number).encode())):
                    member = tarfile.TarInfo(f"{number:06d}{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return sorted(folder.iterdir())


def make_encoding(folder: Path) -> Encoding:
    """A text tokenizer of 300 ids and a patch tokenizer (16 x 16 pixels, 40 codes), their files in ``folder``."""
    train_text_tokenizer(map(caption, range(40)), 300, folder / "text_tokenizer.json")
    codebook = torch.randint(0, 256, (40, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    PatchTokenizer(codebook, SIZE).save(folder / "image_tokenizer.safetensors")
    return Encoding(folder / "text_tokenizer.json", folder / "image_tokenizer.safetensors", "center")


def run(source, prefix: Path, encoding, workers=1, overwrite=False):
    prefix.parent.mkdir(parents=True, exist_ok=True)
    return engine.preprocess(find_parts([str(source)], "train"), prefix, encoding, workers, overwrite)


def output_bytes(prefix: Path) -> dict[str, bytes]:
    return {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in OUTPUTS}


def tool(*arguments, check=True, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, TOOL, *map(str, arguments)]
    return subprocess.run(command, check=check, capture_output=True, text=True, **options)


@contextmanager
def locked(folder: Path, first: int = 0, number: int = 0):
    """Another process holds the lock of ``number`` parts (0: all) of a parts folder."""
    folder.mkdir(parents=True, exist_ok=True)
    hold = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX, int(sys.argv[3]), "
    hold += "int(sys.argv[2])); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(folder / "lock"), str(first), str(number)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield
        process.stdin.close()


def wait_for_parts(process, folder: Path, number: int) -> list[Path]:
    """The manifests of the finished parts as soon as there are ``number``."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        finished = [path for path in sorted(folder.glob("*.json")) if path.stem.isdecimal()]
        if len(finished) >= number:
            return finished
        time.sleep(0.005)
    raise AssertionError(f"{number} parts did not appear while the process ran (exit code {process.poll()})")


def wait_for_workers(session: int) -> None:
    """Until no process of the session is left: orphaned workers must end by themselves."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(session, signal.SIGKILL)
    raise AssertionError("workers outlived their parent by 20 seconds")
