"""Reading other people's weight files: safetensors, or torch.save's format without executing what a pickle asks for."""

import hashlib
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import safetensors.torch
import torch

from megat2i.files import DataFileError

REMEDY = "Pass the original file of the image tokenizer, or download it again"
WRAPPERS = ("state_dict", "model")  # PyTorch Lightning's name of the weights, and LlamaGen's


def read_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], str]:
    """(tensors by name, SHA-256 of the file) of a weight file, taken out of Lightning's or LlamaGen's wrapper.

    Tensors may be views of the file: copy those that are kept. Raises DataFileError, also where the file holds Python
    objects that only executing its pickle would restore.
    """
    try:
        with open(path, "rb") as file:
            begin = file.read(9)
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataFileError(path, f"cannot be read ({error.strerror})", "Check the path") from error
    content = _read_safetensors(path) if begin[8:] == b"{" else _read_torch(path)
    wrapper = next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
    tensors = content[wrapper] if wrapper else content
    odd = [name for name, value in tensors.items() if not isinstance(name, str) or not isinstance(value, torch.Tensor)]
    if odd or not tensors:
        what = f"holds {str(odd[0])!r:.60}, which is not a tensor" if odd else "holds no tensor"
        raise DataFileError(path, f"not a file of weights: it {what}", REMEDY)
    return dict(tensors), sha256


def _read_safetensors(path: str | Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise DataFileError(path, f"a truncated or damaged safetensors file ({error})", REMEDY) from error


def _read_torch(path: str | Path) -> Mapping:
    try:
        # Mapped where the format allows: a training checkpoint's optimizer state is then never read.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            problem = f"refused: besides tensors it holds {found[1]}, and restoring that could run any program"
            remedy = "Save its state_dict alone, in the environment and with the trust that made the file"
            raise DataFileError(path, problem, remedy) from error
        raise DataFileError(path, "neither a safetensors file nor one of torch.save", REMEDY) from error
    except MemoryError:
        raise
    except Exception as error:
        # Damaged bytes make the unpickler and the zip reader raise errors of a dozen kinds. Whatever it is, it is a
        # statement about this file, and its first line is passed on.
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise DataFileError(path, f"a truncated, damaged or foreign file ({reason})", REMEDY) from error
    if not isinstance(content, Mapping):
        raise DataFileError(path, f"not a file of weights: it holds a {type(content).__name__}", REMEDY)
    return content
