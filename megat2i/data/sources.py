"""Where captioned images come from: folders, JSONL files, WebDataset shards, Parquet files, OpenMoji.

``find_parts`` turns the inputs of a job into parts: pieces of work of a few hundred samples that depend on the input
alone, never on the number of workers. A part is a small picklable value; ``samples()`` reads it in whatever process it
lands in. What cannot be used is yielded as ``Refused`` and never ends the job: inputs are other people's files.
"""

import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from megat2i.data import openmoji
from megat2i.data.images import decode_image, read_image_file
from megat2i.data.samples import (
    BLOCK,
    IMAGE_SUFFIXES,
    MAXIMUM_CAPTION_BYTES,
    Part,
    Refused,
    Sample,
    clean_caption,
    decode_caption,
    file_identity,
    first_caption,
)
from megat2i.data.shards import TarPart, check_tars, parquet_parts
from megat2i.files import DataFileError, bounded_lines, read_regular_file, storage_errors
from megat2i.progress import count
from megat2i.weights_file import file_sha256

IMAGE_KEYS = ("image", "file_name")
MAXIMUM_LINE = 8 * MAXIMUM_CAPTION_BYTES  # of a JSONL file: JSON may write a character as six
METADATA = "metadata.jsonl"  # of a folder: the captions of its images, as Hugging Face writes them
KINDS = "a folder of images, a .jsonl file, WebDataset .tar shards, .parquet files or the word openmoji"


def find_parts(inputs: Sequence[str], openmoji_split: str, open_tars: bool = True) -> list[Part]:
    """The parts of all ``inputs``, in order. Raises DataFileError for an input that is none of the kinds.

    open_tars: also for a .tar file that is none; a task of many opens those of its share alone.
    """
    by_suffix = {".jsonl": jsonl_parts, ".tar": lambda path: [TarPart(str(path))], ".parquet": parquet_parts}
    parts: list[Part] = []
    for text in inputs:
        path = Path(text)
        if text == "openmoji":
            parts += openmoji_parts(openmoji_split)
        elif path.is_dir():
            parts += jsonl_parts(path / METADATA, text) if (path / METADATA).exists() else folder_parts(path)
        elif not path.exists():
            raise DataFileError(text, "no such file or folder", f"Pass {KINDS}")
        elif path.suffix in by_suffix:
            parts += by_suffix[path.suffix](path)
        else:
            raise DataFileError(text, "not an input that this tool knows", f"Pass {KINDS}")
    if open_tars:
        check_tars(parts)
    return parts


def _decode_file(path: str, size: int) -> Image.Image:
    return decode_image(read_image_file(path), size)


@dataclass(frozen=True)
class FolderPart:
    """Image files of a folder, each with its caption in a .txt file of the same name."""

    source: str
    names: tuple[str, ...]  # relative to the folder
    opens_source: bool

    @property
    def expected(self) -> int:
        return len(self.names)

    def identity(self) -> str:
        files = (os.path.join(self.source, file) for name in self.names for file in (name, _caption_file(name)))
        return "\n".join(map(file_identity, files))

    def samples(self) -> Iterator[Sample | Refused]:
        for name in self.names:
            try:
                file = os.path.join(self.source, _caption_file(name))
                caption = decode_caption(read_regular_file(file, MAXIMUM_CAPTION_BYTES))
            except DataFileError:
                raise
            except OSError as error:
                yield Refused(name, f"no caption: {Path(_caption_file(name)).name}: {error.strerror}")
            except ValueError as error:
                yield Refused(name, str(error))
            else:
                yield Sample(name, caption, functools.partial(_decode_file, os.path.join(self.source, name)))


def other_files(inputs: Sequence[str]) -> str:
    """One line on the files in folders of images that are of other kinds and are not looked at; empty without any."""
    kinds: Counter[str] = Counter()
    for folder in inputs:
        if not os.path.isdir(folder) or os.path.exists(os.path.join(folder, METADATA)):
            continue
        for _, _, files in os.walk(folder):
            endings = (os.path.splitext(file)[1].lower() for file in files)
            kinds.update(ending or "without an ending" for ending in endings if ending not in (*IMAGE_SUFFIXES, ".txt"))
    listed = ", ".join(f"{ending} {number:,}" for ending, number in sorted(kinds.items()))
    return f"{count(kinds.total(), 'file')} of other kinds not looked at: {listed}" if kinds else ""


def _caption_file(name: str) -> str:
    return os.path.splitext(name)[0] + ".txt"


def folder_parts(folder: Path) -> list[FolderPart]:
    """Parts of the images in ``folder`` and the folders below it, sorted by path."""
    names = [
        os.path.relpath(os.path.join(root, file), folder)
        for root, _, files in os.walk(folder)
        for file in files
        if file.lower().endswith(IMAGE_SUFFIXES)
    ]
    if not names:
        remedy = f"Pass {KINDS}; shards in a folder are passed as FOLDER/*.tar or FOLDER/*.parquet"
        raise DataFileError(folder, f"no {', '.join(IMAGE_SUFFIXES)} file in this folder", remedy)
    names.sort()
    return [FolderPart(str(folder), tuple(names[i : i + BLOCK]), i == 0) for i in range(0, len(names), BLOCK)]


@dataclass(frozen=True)
class JsonlPart:
    """Consecutive lines of a JSONL file: the bytes from ``start`` to ``end``, the first being line ``line``."""

    source: str
    path: str
    start: int
    end: int
    line: int
    expected: int

    @property
    def opens_source(self) -> bool:
        return self.start == 0

    def identity(self) -> str:
        """The lines themselves, and the files they name; the rest of the JSONL file does not matter."""
        content = hashlib.sha256()
        with storage_errors(self.path), open(self.path, "rb") as file:
            file.seek(self.start)
            for start in range(self.start, self.end, MAXIMUM_LINE):
                content.update(file.read(min(MAXIMUM_LINE, self.end - start)))
        files = [file_identity(path) for _, _, path in self._rows() if path]
        return "\n".join([content.hexdigest(), *files])

    def samples(self) -> Iterator[Sample | Refused]:
        for name, caption, path in self._rows():
            if path is None:
                yield Refused(name, caption)
            else:
                yield Sample(name, caption, functools.partial(_decode_file, path))

    def _lines(self) -> Iterator[tuple[int, bytes | None]]:
        """(number, content) of the lines; None for one that is too long."""
        with storage_errors(self.path), open(self.path, "rb") as file:
            file.seek(self.start)
            yield from enumerate(bounded_lines(file, MAXIMUM_LINE, self.end), self.line)

    def _rows(self) -> Iterator[tuple[str, str, str | None]]:
        """(name, caption, path of the image) of every line; (name, reason, None) for one that cannot be used."""
        for number, line in self._lines():
            name = f"line {number}"
            if line is None:
                yield name, f"more than {MAXIMUM_LINE:,} bytes", None
                continue
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not a JSON object")
                file = next((row[key] for key in IMAGE_KEYS if key in row), None)
                if not isinstance(file, str) or not file or "\0" in file:
                    raise ValueError(f"no file name under {' or '.join(IMAGE_KEYS)}")
                name = f"{name}: {file}"
                caption = clean_caption(first_caption(row))
                os.fsencode(file)
            except RecursionError:
                yield name, "not JSON: nested too deeply", None
            except ValueError as error:  # JSONDecodeError, UnicodeDecodeError and UnicodeEncodeError are ValueErrors
                yield name, str(error), None
            else:
                yield name, caption, os.path.join(os.path.dirname(self.path), file)


def jsonl_parts(path: Path, source: str | None = None) -> list[JsonlPart]:
    """Parts of ``path``: blocks of lines. Images are named relative to the file's folder."""
    parts, start, first, filled = [], 0, 1, 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(bounded_lines(file, MAXIMUM_LINE), 1):
                filled += 1 if line is None or line.strip() else 0
                if filled == BLOCK:
                    parts.append(JsonlPart(source or str(path), str(path), start, file.tell(), first, filled))
                    start, first, filled = file.tell(), number + 1, 0
            if filled:
                parts.append(JsonlPart(source or str(path), str(path), start, file.tell(), first, filled))
    except OSError as error:
        raise DataFileError(path, f"cannot be read ({error.strerror})", "Check the path") from error
    if not parts:
        raise DataFileError(path, "an empty file", 'Write one {"image": ..., "caption": ...} object per line')
    return parts


@dataclass(frozen=True)
class OpenMojiPart:
    """A block of the drawings of one split of OpenMoji."""

    split: str
    start: int
    expected: int
    source: str = "openmoji"

    @property
    def opens_source(self) -> bool:
        return self.start == 0

    def identity(self) -> str:
        drawings = openmoji.captioned_images(self.split)[self.start : self.start + self.expected]
        return f"{openmoji.VERSION}\n{drawings}"

    def samples(self) -> Iterator[Sample | Refused]:
        for drawing in openmoji.captioned_images(self.split)[self.start : self.start + self.expected]:
            yield Sample(drawing.name, drawing.caption, functools.partial(openmoji.render, drawing.characters))


def openmoji_parts(split: str) -> list[OpenMojiPart]:
    """Parts of a ``split`` of OpenMoji (one of its SPLITS)."""
    total = len(openmoji.captioned_images(split))
    return [OpenMojiPart(split, start, min(BLOCK, total - start)) for start in range(0, total, BLOCK)]


def describe_source(source: str) -> tuple[str, int]:
    """(SHA-256, bytes) of an input: of a file's content; of OpenMoji's release and font.

    Of a folder: the digest of the sorted list of its images, captions and metadata files with their sizes, and the sum
    of these. Reading all of them twice would cost more than it tells: their content is in the tokens.
    """
    if source == "openmoji":
        return hashlib.sha256(openmoji.VERSION.encode()).hexdigest(), openmoji.font_bytes()
    if not os.path.isdir(source):
        return file_sha256(source), os.path.getsize(source)
    listing, total = hashlib.sha256(), 0
    for root, folders, files in os.walk(source):
        folders.sort()
        for file in sorted(files):
            if file.lower().endswith((*IMAGE_SUFFIXES, ".txt")) or file == METADATA:
                path = os.path.join(root, file)
                size = os.lstat(path).st_size
                listing.update(os.fsencode(os.path.relpath(path, source)) + f"\0{size}\n".encode())
                total += size
    return listing.hexdigest(), total


def source_identity(source: str) -> str:
    """Changes when what ``describe_source`` says changes, without reading a file."""
    return describe_source(source)[0] if os.path.isdir(source) else file_identity(source)
