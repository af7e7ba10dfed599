"""The file of an image tokenizer: safetensors (never pickle), with metadata that say which kind it is.

The metadata have the single key ``image_tokenizer``: a JSON object with at least ``kind``.
"""

import hashlib
import json
from pathlib import Path

import safetensors.torch
import torch

from megat2i.files import DataFileError, PendingFile, commit

METADATA_KEY = "image_tokenizer"  # one key: with several their order, hence the file's digest, would vary
REMEDY = (
    "Pass an image_tokenizer.safetensors written by tools/preprocess_data.py, which takes a network's published "
    "weights from --image-checkpoint"
)


def read_tokenizer_file(path: str | Path) -> tuple[dict[str, torch.Tensor], dict, str]:
    """(tensors by name, metadata, SHA-256) of an image tokenizer's file. Raises DataFileError."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataFileError(path, f"cannot be read ({error.strerror})", "Check the tokenizer's path") from error
    try:
        tensors = safetensors.torch.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = json.loads(header["__metadata__"][METADATA_KEY])
    except (safetensors.SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise DataFileError(path, f"not an image tokenizer's file ({error!r})", REMEDY) from error
    if not isinstance(metadata, dict):
        raise DataFileError(path, f"metadata {METADATA_KEY} is not an object", REMEDY)
    return tensors, metadata, hashlib.sha256(content).hexdigest()


def tokenizer_file_content(tensors: dict[str, torch.Tensor], metadata: dict) -> bytes:
    """The bytes of an image tokenizer's file: the same for the same content."""
    return safetensors.torch.save(tensors, {METADATA_KEY: json.dumps(metadata, sort_keys=True)})


def write_tokenizer_file(path: str | Path, content: bytes) -> None:
    """Write ``content`` atomically."""
    file = PendingFile(Path(path))
    try:
        file.write(content)
        commit([file])
    finally:
        file.discard()
