"""Captioned images packed many to a file: WebDataset tar shards (img2dataset's layout) and Parquet.

A tar is only ever read, never extracted: members are taken from the bytes of the file, and links, devices and names
that point outside are refused by name.
"""

import functools
import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from megat2i.data.images import MAXIMUM_BYTES, UnreadableImage, decode_image
from megat2i.data.samples import (
    BLOCK,
    IMAGE_SUFFIXES,
    MAXIMUM_CAPTION_BYTES,
    Refused,
    Sample,
    clean_caption,
    decode_caption,
    file_identity,
    first_caption,
)
from megat2i.files import DataFileError, raise_if_transient, storage_errors

MAXIMUM_NAME = 1024  # characters of a member's name
MAXIMUM_MEMBERS = 100  # of a sample
PARQUET_IMAGES = ("image", "jpg", "image_bytes")
PARQUET_CAPTIONS = ("caption", "text", "TEXT")
PARQUET_BATCH = 32  # rows held in memory at a time


class _SharedFile(io.FileIO):
    """A file that is closed when the last sample that may still read from it is gone."""

    def __del__(self):
        self.close()


@dataclass(frozen=True)
class TarPart:
    """One shard. The members of a sample follow each other and share their name up to the first dot."""

    source: str
    expected: int | None = None  # known only after reading
    opens_source: bool = True

    def identity(self) -> str:
        return file_identity(self.source)

    def samples(self) -> Iterator[Sample | Refused]:
        with storage_errors(self.source):
            file, key, group = _SharedFile(self.source), None, {}
        for member in _members(file):
            if isinstance(member, Refused):
                yield member
                continue
            path = PurePosixPath(member.name)
            stem, _, ending = path.name.partition(".")
            if not stem:  # .DS_Store, ._0001.jpg: what a file manager left
                yield Refused(member.name, "a hidden file")
                continue
            member_key, ending = str(path.with_name(stem)), "." + ending.lower()
            if member_key != key or ending in group:
                if group:
                    yield _tar_sample(file, key, group)
                key, group = member_key, {}
            if len(group) <= MAXIMUM_MEMBERS:
                group[ending] = member
        if group:
            yield _tar_sample(file, key, group)


def check_tars(parts: Sequence) -> None:
    """DataFileError where the file of a TarPart among ``parts`` is not an uncompressed tar file."""
    for path in (part.source for part in parts if isinstance(part, TarPart)):
        try:
            with tarfile.open(path, "r:"):
                pass
        except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError, MemoryError) as error:
            remedy = "Pass an uncompressed .tar file, or remove this one from the list"
            raise DataFileError(path, f"not a readable tar archive ({error})", remedy) from error


def _members(file) -> Iterator[tarfile.TarInfo | Refused]:
    """The regular members of a tar file with safe names; ``Refused`` for others and for damage, which ends the file."""
    last, name = -1, "the beginning"
    try:
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (the caller closes the file)
        while (member := archive.next()) is not None:
            archive.members.clear()  # it would keep every header of the shard
            if member.size < 0 or member.offset <= last:  # older Pythons read in circles from such a header
                raise tarfile.ReadError("a header with a negative size")
            last, name = member.offset, member.name[:MAXIMUM_NAME]
            problem = _problem(member)
            if problem:
                yield Refused(name, problem)
            elif member.isreg():
                yield member
        # tarfile takes a damaged header for the end of the archive. The real end is a block of zeros.
        if any(ending := os.pread(file.fileno(), tarfile.BLOCKSIZE, archive.offset)) or not ending:
            yield Refused(f"after {name}", "the archive is damaged or cut off here")
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise_if_transient(file.name, error)
        yield Refused(f"after {name}", f"the archive is damaged here: {error or 'a header of many gigabytes'}")


def _problem(member: tarfile.TarInfo) -> str | None:
    path = PurePosixPath(member.name)
    if len(member.name) > MAXIMUM_NAME:
        return f"a name of {len(member.name):,} characters"
    if path.is_absolute() or ".." in path.parts:
        return "a name that points outside of the archive"
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        return "a link, device or other special member"
    if member.size > MAXIMUM_BYTES:
        return f"{member.size:,} bytes, more than {MAXIMUM_BYTES:,}"
    return None


def _tar_sample(file, key: str, group: dict[str, tarfile.TarInfo]) -> Sample | Refused:
    if len(group) > MAXIMUM_MEMBERS:
        return Refused(key, f"more than {MAXIMUM_MEMBERS} files")
    image = next((group[suffix] for suffix in IMAGE_SUFFIXES if suffix in group), None)
    if image is None:
        return Refused(key, f"no image: its files are {', '.join(group)}")
    try:
        if ".txt" in group:
            caption = decode_caption(_read_member(file, group[".txt"], MAXIMUM_CAPTION_BYTES))
        elif ".json" in group:
            value = json.loads(_read_member(file, group[".json"], MAXIMUM_CAPTION_BYTES))
            caption = clean_caption(first_caption(value) if isinstance(value, dict) else None)
        else:
            return Refused(key, "no caption: neither .txt nor .json")
    except DataFileError:
        raise
    except RecursionError:
        return Refused(key, "its .json is nested too deeply")
    except ValueError as error:
        return Refused(key, str(error))
    return Sample(key, caption, functools.partial(_tar_image, file, image))


def _tar_image(file, member: tarfile.TarInfo, size: int) -> Image.Image:
    return decode_image(_read_member(file, member, MAXIMUM_BYTES), size)


def _read_member(file, member: tarfile.TarInfo, maximum: int) -> bytes:
    """The content of a regular member. ValueError where it is longer than ``maximum`` or the file ends before it."""
    if member.size > maximum:
        raise ValueError(f"{member.name}: {member.size:,} bytes, more than {maximum:,}")
    try:
        content = os.pread(file.fileno(), member.size, member.offset_data)
    except OSError as error:
        raise_if_transient(file.name, error)
        raise UnreadableImage(error.strerror) from error
    if len(content) != member.size:
        raise UnreadableImage(f"{member.name}: the archive ends inside it")
    return content


@dataclass(frozen=True)
class ParquetPart:
    """Row groups ``first`` to ``last`` - 1 of a file, from row ``row`` on."""

    source: str
    image: str  # name of the column of image bytes, or of structures with a field "bytes"
    caption: str
    first: int
    last: int
    row: int
    expected: int

    @property
    def opens_source(self) -> bool:
        return self.row == 0

    def identity(self) -> str:
        return f"{file_identity(self.source)}: row groups {self.first} to {self.last}"

    def samples(self) -> Iterator[Sample | Refused]:
        row = self.row
        try:
            with pq.ParquetFile(self.source) as file:
                columns = {file.schema.column(number).path for number in range(len(file.schema))}
            # A dictionary stays one: a long caption that all rows share is in memory once.
            dictionary = [self.caption] if self.caption in columns else None  # not where it has an inner structure
            with pq.ParquetFile(self.source, read_dictionary=dictionary) as file:
                groups = range(self.first, self.last)
                columns = [self.image, self.caption]
                for batch in file.iter_batches(PARQUET_BATCH, groups, columns, use_threads=False):
                    for image, caption in zip(batch[self.image], batch[self.caption], strict=True):
                        yield _parquet_sample(f"row {row}", image, caption)
                        row += 1
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:  # ValueError: names that are not UTF-8
            if isinstance(error, DataFileError):
                raise
            raise_if_transient(self.source, error)
            yield Refused(f"rows {row} to {self.row + self.expected - 1}", f"the file is damaged here: {error}")


def _parquet_sample(name: str, image: pa.Scalar, caption: pa.Scalar) -> Sample | Refused:
    try:
        text = caption.value if isinstance(caption, pa.DictionaryScalar) else caption
        known = isinstance(text, pa.StringScalar | pa.LargeStringScalar) and text.is_valid
        if known and (length := text.as_buffer().size) > MAXIMUM_CAPTION_BYTES:
            return Refused(name, f"a caption of {length:,} bytes, more than {MAXIMUM_CAPTION_BYTES:,}")
        return Sample(name, clean_caption(caption.as_py()), functools.partial(_parquet_image, image))
    except UnicodeDecodeError:
        return Refused(name, "the caption is not UTF-8")
    except ValueError as error:
        return Refused(name, str(error))


def _parquet_image(image: pa.Scalar, size: int) -> Image.Image:
    value = image.as_py()
    content = value.get("bytes") if isinstance(value, dict) else value
    if content is None:
        raise UnreadableImage("no image bytes")
    return decode_image(content, size)


def parquet_parts(path: Path) -> list[ParquetPart]:
    """Parts of at least ``BLOCK`` rows, whole row groups each. DataFileError where the columns are not there."""
    try:
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataFileError(path, f"not a readable Parquet file ({error})", "Write or copy it again") from error
    image = next((name for name in PARQUET_IMAGES if name in schema.names and _has_bytes(schema.field(name))), None)
    caption = next((name for name in PARQUET_CAPTIONS if name in schema.names), None)
    if image is None or caption is None:
        problem = f"its columns are {', '.join(f'{field.name} ({field.type})' for field in schema)}"
        remedy = f"Name one of bytes {' or '.join(PARQUET_IMAGES)} and one of text {' or '.join(PARQUET_CAPTIONS)}"
        raise DataFileError(path, problem, remedy)
    parts, first, row, rows = [], 0, 0, 0
    for group in range(metadata.num_row_groups):
        rows += metadata.row_group(group).num_rows
        if rows >= BLOCK or (rows and group == metadata.num_row_groups - 1):
            parts.append(ParquetPart(str(path), image, caption, first, group + 1, row, rows))
            first, row, rows = group + 1, row + rows, 0
    return parts


def whole_files(parts: Sequence) -> list:
    """The same work with one part for each Parquet file."""
    whole = []
    for part in parts:
        if isinstance(part, ParquetPart) and part.row:
            first = whole.pop()
            part = replace(first, last=part.last, expected=first.expected + part.expected)
        whole.append(part)
    return whole


def _has_bytes(field: pa.Field) -> bool:
    if pa.types.is_struct(field.type):
        return field.type.get_field_index("bytes") >= 0 and _has_bytes(field.type.field("bytes"))
    return pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)
