"""PREFIX.json, the manifest of a token store: what the ids mean, where they came from, and digests of every byte.

Megatron's .idx + .bin carry no checksum and do not say which tokenizer wrote them. The manifest does. It is written
last, so its presence means that the store is complete. It carries a digest of itself: what the ids mean cannot change
unseen. Stores of format version 1 have none and open as ever.
"""

import hashlib
import json
import os
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np

from megat2i.files import DataFileError, PendingFile, commit, store_path

FORMAT_VERSION = 2
WITHOUT_DIGEST = 1  # the version before
DTYPE_NAMES = ("uint8", "int8", "int16", "int32", "int64", "uint16")  # the integer types of the .idx
BLOCK_BYTES = (
    16 * 2**20
)  # of the .bin under one digest: small enough to locate damage, large enough to stay a short list
REBUILD = "Build the store again from its sources, or copy it again"


@dataclass(frozen=True)
class TokenCounts:
    """Number of stored tokens per modality."""

    text: int
    image: int


@dataclass(frozen=True)
class CaptionLengths:
    """How many ids captions have: half of them at most ``median``, 99% at most ``percentile_99``."""

    median: int
    percentile_99: int
    longest: int


@dataclass(frozen=True)
class TextContent:
    """What the text ids are. ``min_id`` and ``max_id`` are None where the store holds no text token.

    ``unknown``: ids that stand for what the tokenizer does not know, None where it knows everything. Older stores, and
    parts of a job, have no ``captions``.
    """

    vocab_size: int
    min_id: int | None
    max_id: int | None
    tokenizer: str  # file name, relative to the manifest's folder
    kind: str
    sha256: str
    unknown: int | None = None
    captions: CaptionLengths | None = None


@dataclass(frozen=True)
class ImageContent:
    """What the image codes are. ``grid`` is (rows, columns) of codes, ``image_size`` the side in pixels."""

    codebook_size: int
    min_code: int | None
    max_code: int | None
    grid: tuple[int, int]
    image_size: int
    crop: str
    encoder_precision: str
    tokenizer: str  # file name, relative to the manifest's folder
    kind: str
    sha256: str


@dataclass(frozen=True)
class Source:
    """One input of the store, ``sha256`` and ``size`` (bytes) as ``sources.describe_source`` gives them.

    Older stores have no ``sha256``; stores of a later piece of a source have neither: that of its first piece does.
    """

    name: str
    samples: int
    sha256: str | None = None
    size: int | None = None


@dataclass(frozen=True)
class BlockDigests:
    """SHA-256 (hexadecimal) of each consecutive block of ``block_bytes`` of the .bin; the last may be shorter."""

    block_bytes: int
    sha256: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """The content of PREFIX.json. ``text`` or ``image`` is None where the store has no such sequences."""

    documents: int
    sequences: int
    tokens: TokenCounts
    dtype: str  # numpy name: "uint16"
    text: TextContent | None
    image: ImageContent | None
    sources: tuple[Source, ...]
    index_sha256: str
    bin_blocks: BlockDigests

    @classmethod
    def read(cls, prefix: str | Path) -> "Manifest | None":
        """The manifest of the store ``prefix``; None where there is no PREFIX.json. Raises DataFileError."""
        path = store_path(prefix, ".json")
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            version = value.pop("format_version", None) if isinstance(value, dict) else None
            sound = version != FORMAT_VERSION or value.pop("sha256", None) == _fields_sha256(value)
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise DataFileError(path, f"not a JSON file ({error})", REBUILD) from error
        if type(version) is not int or version not in (WITHOUT_DIGEST, FORMAT_VERSION):
            problem = f"format_version is {version!r}, this release reads {WITHOUT_DIGEST} and {FORMAT_VERSION}"
            raise DataFileError(path, problem, "Use a matching release")
        if not sound:
            raise DataFileError(path, "its content is not what its own sha256 was taken of", REBUILD)
        manifest = _parse(cls, value, path, "")
        if manifest.bin_blocks.block_bytes < 1:
            raise DataFileError(path, "bin_blocks.block_bytes is 0", REBUILD)
        if manifest.dtype not in DTYPE_NAMES:
            raise DataFileError(path, f"dtype is {manifest.dtype!r}, expected one of {DTYPE_NAMES}", REBUILD)
        return manifest

    def write(self, prefix: str | Path) -> None:
        """Write PREFIX.json atomically. Call it last: its presence declares the store complete."""
        file = PendingFile(store_path(prefix, ".json"))
        content = asdict(self)
        head = {"format_version": FORMAT_VERSION, "sha256": _fields_sha256(content)}
        try:
            file.write((json.dumps(head | content, indent=1) + "\n").encode())
            commit([file])
        finally:
            file.discard()

    @property
    def bin_bytes(self) -> int:
        """Size of the .bin in bytes."""
        return (self.tokens.text + self.tokens.image) * np.dtype(self.dtype).itemsize

    def verify(self, prefix: str | Path, data: bool = True) -> None:
        """Compare the store with its digests: the .idx and the size of the .bin, and with ``data`` every byte of it.

        Raises DataFileError naming the file and, for the .bin, the range of bytes that differs.
        """
        index_path, bin_path = store_path(prefix, ".idx"), store_path(prefix, ".bin")
        if _file_sha256(index_path) != self.index_sha256:
            problem = f"its SHA-256 is not the index_sha256 of {store_path(prefix, '.json').name}"
            raise DataFileError(index_path, problem, REBUILD)
        size = _file_size(bin_path)
        if size != self.bin_bytes:
            raise DataFileError(bin_path, f"{size:,} bytes, the manifest says {self.bin_bytes:,}", REBUILD)
        blocks = -(-size // self.bin_blocks.block_bytes)
        if blocks != len(self.bin_blocks.sha256):
            problem = f"{blocks} blocks, the manifest has digests of {len(self.bin_blocks.sha256)}"
            raise DataFileError(bin_path, problem, REBUILD)
        if data:
            self._verify_blocks(bin_path)

    def _verify_blocks(self, path: Path) -> None:
        block_bytes = self.bin_blocks.block_bytes
        found = digest_file(path, block_bytes).sha256
        for block, (expected, actual) in enumerate(zip(self.bin_blocks.sha256, found, strict=False)):
            if expected != actual:
                end = min((block + 1) * block_bytes, self.bin_bytes)
                problem = f"bytes {block * block_bytes:,} to {end - 1:,} differ from the manifest's digest"
                raise DataFileError(path, problem, REBUILD)


def _fields_sha256(fields: Mapping[str, Any]) -> str:
    """SHA-256 of the fields as JSON in one form, whatever the white space and the order of the keys in the file."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def relative_path(path: str | Path, prefix: str | Path) -> str:
    """``path`` as the manifest of ``prefix`` names it: from the folder that it lies in."""
    # The real paths: where the folder is a link, ".." leads from what it points to.
    return os.path.relpath(os.path.realpath(path), os.path.realpath(Path(prefix).parent))


class BlockDigester:
    """Digests of a stream of bytes, block by block: feed it what is written, then take ``result``."""

    def __init__(self, block_bytes: int = BLOCK_BYTES):
        self.block_bytes = block_bytes
        self._finished: list[str] = []
        self._current, self._filled = hashlib.sha256(), 0

    def update(self, data) -> None:
        view = memoryview(data).cast("B")
        while len(view):
            part = view[: self.block_bytes - self._filled]
            self._current.update(part)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == self.block_bytes:
                self._finished.append(self._current.hexdigest())
                self._current, self._filled = hashlib.sha256(), 0

    def result(self) -> BlockDigests:
        """Digests of everything fed so far."""
        last = [self._current.hexdigest()] if self._filled else []
        return BlockDigests(self.block_bytes, (*self._finished, *last))


def digest_file(
    path: Path, block_bytes: int = BLOCK_BYTES, report: Callable[[int], object] = lambda read: None
) -> BlockDigests:
    """Block digests of an existing file, read as a stream. (IndexedWriter.digests gives them without a second read.)

    ``report`` is called with the number of bytes read since its last call.
    """
    digester = BlockDigester(block_bytes)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digester.update(chunk)
            report(len(chunk))
    return digester.result()


def _file_sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise DataFileError(path, "not found", REBUILD) from error


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError as error:
        raise DataFileError(path, "not found", REBUILD) from error


def _parse(kind: Any, value: Any, path: Path, where: str) -> Any:
    """Parsed JSON as ``kind``: a dataclass, a tuple, X | None, int or str. DataFileError names the field ``where``."""
    if is_dataclass(kind) and isinstance(value, Mapping):
        kinds = {field.name: field.type for field in fields(kind)}
        needed = {field.name for field in fields(kind) if field.default is MISSING}  # newer fields have a default
        if odd := sorted((needed - set(value)) | (set(value) - set(kinds))):
            raise DataFileError(path, f"fields {odd} of {where or 'the top level'} are missing or unknown", REBUILD)
        return kind(**{name: _parse(kinds[name], value[name], path, f"{where}.{name}".lstrip(".")) for name in value})
    if get_origin(kind) is types.UnionType:
        inner = next(option for option in get_args(kind) if option is not types.NoneType)
        return None if value is None else _parse(inner, value, path, where)
    if get_origin(kind) is tuple and isinstance(value, list):
        element, *rest = get_args(kind)
        if rest == [Ellipsis] or len(value) == len(rest) + 1:
            return tuple(_parse(element, item, path, f"{where}[{i}]") for i, item in enumerate(value))
    if kind is str and isinstance(value, str) or kind is int and type(value) is int and value >= 0:
        return value
    expected = getattr(kind, "__name__", kind)
    raise DataFileError(path, f"{where or 'the top level'} is {value!r:.80}, expected {expected}", REBUILD)
