"""A folder of images to be measured: which files, in which order, all of them readable, and a digest of their content.

A folder of tools/generate.py lists its images in ``samples.jsonl``, each with its prompt; they must all be there.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor

from megat2i.data.images import MAXIMUM_PIXELS, UnreadableImage, decode_image, read_image_file
from megat2i.data.samples import IMAGE_SUFFIXES
from megat2i.files import DataFileError
from megat2i.weights_file import file_sha256

SAMPLES = "samples.jsonl"
AHEAD = 64  # images that threads decode while the feature net works


@dataclass
class ImageFolder:
    """The images of ``folder`` and those below it; ``prompts`` belong to them where it is one of tools/generate.py."""

    folder: Path
    names: list[str]
    prompts: list[str] | None
    _digests: dict[str, str] = field(default_factory=dict)  # by name, of the files read so far

    @staticmethod
    def open(folder: Path) -> "ImageFolder":
        """Raises DataFileError: no folder, no image, or not all of the images that samples.jsonl lists."""
        if not folder.is_dir():
            raise DataFileError(folder, "no such folder", "Pass a folder of images")
        if (folder / SAMPLES).exists():
            return ImageFolder(folder, *_listed(folder))
        names = sorted(
            os.path.relpath(os.path.join(root, file), folder)
            for root, _, files in os.walk(folder)
            for file in files
            if file.lower().endswith(IMAGE_SUFFIXES)
        )
        if not names:
            raise DataFileError(folder, f"holds no {', '.join(IMAGE_SUFFIXES)} file", "Pass a folder of images")
        return ImageFolder(folder, names, None)

    def prepared(self, prepare: Callable[[Image.Image], Tensor]) -> Iterator[Tensor]:
        """``prepare`` of every image (RGB), in order. DataFileError names the first one that cannot be read."""
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(self.names), AHEAD):
                yield from pool.map(lambda name: prepare(self._read(name)), self.names[start : start + AHEAD])

    def description(self) -> dict:
        """What was measured; to be asked once all images have been read."""
        digest = hashlib.sha256("".join(f"{name}\0{self._digests[name]}\n" for name in self.names).encode())
        found = {"source": str(self.folder), "images": len(self.names), "sha256": digest.hexdigest()}
        if self.prompts is not None:
            prompts = hashlib.sha256("".join(f"{prompt}\n" for prompt in self.prompts).encode()).hexdigest()
            listing = self.folder / SAMPLES
            found["prompts"] = {"file": str(listing), "file_sha256": file_sha256(listing), "sha256": prompts}
        return found

    def _read(self, name: str) -> Image.Image:
        try:
            content = read_image_file(self.folder / name)
            self._digests[name] = hashlib.sha256(content).hexdigest()
            return decode_image(content, MAXIMUM_PIXELS)  # from all pixels of a JPEG
        except UnreadableImage as error:
            problem, remedy = f"cannot be measured: {error}", "Make the image again, or leave it out of the folder"
            raise DataFileError(self.folder / name, problem, remedy) from error


def _listed(folder: Path) -> tuple[list[str], list[str]]:
    """(names, prompts) of the images that samples.jsonl lists."""
    try:
        lines = [json.loads(line) for line in (folder / SAMPLES).read_text(encoding="utf-8").splitlines()]
        names, prompts = [str(line["file"]) for line in lines], [str(line["prompt"]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataFileError(
            folder / SAMPLES, f"not a list of samples ({error!r})", "Generate the images again"
        ) from error
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing or not names:
        problem = (
            f"{len(missing)} of its {len(names)} images are missing, the first is {missing[0]}" if missing else "empty"
        )
        raise DataFileError(folder / SAMPLES, problem, "Give the same command to tools/generate.py again: it goes on")
    return names, prompts
