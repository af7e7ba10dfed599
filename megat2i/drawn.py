"""RUN/drawn: the configured prompts as the model drew them during training, one strip of pictures a step.

``step-000600.png`` holds the pictures side by side, as large as the tokenizer makes them; ``step-000600.json`` lists
their prompts. The listing is written last, so a picture with a listing is complete.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from megat2i.files import DataFileError, PendingFile, commit, read_json_object

FOLDER = "drawn"
REMEDY = "Remove this step from the folder"
_NAME = re.compile(r"step-([0-9]{6,18})\.(png|json)")


@dataclass(frozen=True)
class DrawnStep:
    """Pictures [B, 3, H, W] uint8 of B prompts after ``step`` steps of training."""

    step: int
    prompts: list[str]
    images: np.ndarray


def save_step(run_dir: Path, step: int, images: np.ndarray, prompts: Sequence[str]) -> None:
    """Write ``images`` [B, 3, H, W] uint8; what the folder holds of the same step is replaced."""
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    strip = np.concatenate(list(images), axis=2).transpose(1, 2, 0)
    files = [PendingFile(folder / f"step-{step:06d}.{suffix}") for suffix in ("png", "json")]
    try:
        Image.fromarray(np.ascontiguousarray(strip)).save(files[0], format="PNG")
        files[1].write((json.dumps({"step": step, "prompts": list(prompts)}, ensure_ascii=False) + "\n").encode())
        commit(files)
    finally:
        for file in files:
            file.discard()


def remove_steps_after(run_dir: Path, step: int) -> None:
    """Remove what a stopped run drew after its last checkpoint, and what a killed one left half-written."""
    for path in sorted((run_dir / FOLDER).glob("step-*")):  # of a step the listing first: j before p
        name = _NAME.fullmatch(path.name)
        if path.suffix == ".tmp" or (name and int(name[1]) > step):
            path.unlink()


def read_steps(run_dir: Path) -> list[DrawnStep]:
    """All steps in order; raises DataFileError."""
    listings = [path for path in (run_dir / FOLDER).glob("step-*.json") if _NAME.fullmatch(path.name)]
    return sorted((_read_step(path) for path in listings), key=lambda drawn: drawn.step)


def _read_step(listing: Path) -> DrawnStep:
    content, picture = read_json_object(listing, REMEDY), listing.with_suffix(".png")
    step, prompts = content.get("step"), content.get("prompts")
    if type(step) is not int or not isinstance(prompts, list) or not prompts:
        raise DataFileError(listing, "lists no step with prompts", REMEDY)
    try:
        with Image.open(picture) as opened:
            strip = np.asarray(opened.convert("RGB"))
    except OSError as error:
        raise DataFileError(picture, f"not readable as a picture ({error})", REMEDY) from error
    if strip.shape[1] % len(prompts):
        raise DataFileError(picture, f"{strip.shape[1]} pixels wide, so not {len(prompts)} pictures", REMEDY)
    images = np.stack(np.split(strip, len(prompts), axis=1)).transpose(0, 3, 1, 2)
    return DrawnStep(step, prompts, np.ascontiguousarray(images))
