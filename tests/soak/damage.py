"""Changes of bytes on a disk: what rot, a bad line of memory, a torn copy or a mixed-up restore leave behind."""

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path


def flip_bit(content: bytes, rng: random.Random) -> bytes:
    """One bit is another one."""
    place = rng.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


def overwrite_run(content: bytes, rng: random.Random) -> bytes:
    """2 to 64 bytes in a row are random."""
    place, length = rng.randrange(len(content)), rng.randint(2, 64)
    return (content[:place] + rng.randbytes(length) + content[place + length :])[: len(content)]


def swap_blocks(content: bytes, rng: random.Random) -> bytes:
    """Two blocks of equal length have changed places."""
    length = max(1, min(512, len(content) // 4))
    first, second = sorted(length * block for block in rng.sample(range(len(content) // length), 2))
    middle = content[first + length : second]
    one, other = content[first : first + length], content[second : second + length]
    return content[:first] + other + middle + one + content[second + length :]


def cut_end(content: bytes, rng: random.Random) -> bytes:
    """The end is missing."""
    return content[: rng.randrange(len(content))]


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bit flipped": flip_bit,
    "run of bytes overwritten": overwrite_run,
    "blocks swapped": swap_blocks,
    "truncated": cut_end,
}


def mutate(path: Path, rng: random.Random) -> str:
    """Damage a file so that its content differs, in place; returns how."""
    content = path.read_bytes()
    while True:
        how = rng.choice(list(MUTATIONS))
        changed = MUTATIONS[how](content, rng)
        if changed != content:
            path.write_bytes(changed)
            return how


def change_dtype(path: Path, rng: random.Random) -> str:
    """One byte of a safetensors header makes a part's F32 an I32 or a U32."""
    content = path.read_bytes()
    place = rng.choice([match.start() for match in re.finditer(b'"F32"', content)]) + 1
    path.write_bytes(content[:place] + rng.choice((b"I", b"U")) + content[place + 1 :])
    return "dtype in a header changed"


def damage_checkpoint(newest: Path, older: Path, donors: Path, rng: random.Random) -> str:
    """Damage the checkpoint ``newest``; ``older`` is one of the same run, ``donors`` has another run's. Returns how."""
    files = sorted(path for path in newest.iterdir() if path.is_file())
    parts = [path for path in files if path.suffix == ".safetensors"]
    file, draw = rng.choice(files), rng.random()
    if draw < 0.6:
        return mutate(file, rng)
    if draw < 0.75:
        return change_dtype(rng.choice(parts), rng)
    if draw < 0.82:
        file.unlink()
        return "part missing"
    donor = donors / ("step-2" if newest.name == "step-4" else "step-4")  # the same step would be a sound checkpoint
    how, source = rng.choice((("part of another step", older), ("part of another run", donor)))
    if draw < 0.94:
        shutil.copyfile(source / file.name, file)
        return how
    for file in files:
        shutil.copyfile(source / file.name, file)
    return how.replace("part", "all parts")
