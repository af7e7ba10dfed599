"""Weight files, read and written tensor by tensor: safetensors, and torch.save's format of which nothing is executed.

A file that has to be a little larger than memory is fine: what is mapped for one tensor is let go before the next.
"""

import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from megat2i.files import DataFileError
from megat2i.progress import progress

REMEDY = "Pass the original file, or download it again"
WRAPPERS = ("state_dict", "model")  # names under which training checkpoints hold their weights
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"  # Hugging Face's names
MAXIMUM_TENSORS = 100_000  # of one file
SHARD_BYTES = 5_000_000_000  # of a file that we write, as Hugging Face does
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], str]:
    """(tensors by name, SHA-256 of the file) of a weight file, taken out of Lightning's or LlamaGen's wrapper.

    Tensors may be views of the file: copy those that are kept. Raises DataFileError, also where the file holds Python
    objects that only executing its pickle would restore.
    """
    sha256 = file_sha256(path)
    if _is_safetensors(path):
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                _require_few(path, len(file.keys()))
            return _tensors(path, safetensors.torch.load_file(path), WRAPPERS), sha256
        except safetensors.SafetensorError as error:
            raise _damaged(path, error) from error
    return _tensors(path, _read_torch(path), WRAPPERS), sha256


class Spec(NamedTuple):
    """What a tensor is before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class WeightFiles:
    """The tensors of a weight file, or of a folder of safetensors; ``specs`` by name. Raises DataFileError.

    ``read`` gives one tensor in memory of its own. A file in PyTorch's old format (before 1.6) is read whole.
    """

    def __init__(self, path: str | Path, wrappers: tuple[str, ...] = WRAPPERS):
        self.path, self._wrappers = Path(path), wrappers
        self._files: dict[str, Path] = {}
        self._old_format: dict[str, Tensor] | None = None
        self.specs: dict[str, Spec] = {}
        if self.path.is_dir():
            self._open_folder()
        elif _is_safetensors(self.path):
            self._add_safetensors(self.path)
        else:
            tensors = self._torch_tensors()
            self._old_format = None if zipfile.is_zipfile(self.path) else tensors
            self._files = dict.fromkeys(tensors, self.path)
            self.specs = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}

    def read(self, name: str) -> Tensor:
        """The tensor ``name``, on the CPU."""
        path = self._files[name]
        if self._old_format is not None:
            return self._old_format[name]
        if not _is_safetensors(path):
            return self._torch_tensors()[name].clone()  # mapped anew, so that the file's pages do not pile up
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                return file.get_tensor(name).clone()
        except safetensors.SafetensorError as error:
            raise _damaged(path, error) from error

    def _torch_tensors(self) -> dict[str, Tensor]:
        return _tensors(self.path, _read_torch(self.path), self._wrappers)

    def _open_folder(self) -> None:
        if not (self.path / INDEX).exists():
            if not (self.path / SINGLE).exists() and (pickled := sorted(self.path.glob("pytorch_model*.bin"))):
                problem = f"there is only {pickled[0].name}, a pickle, which is never opened"
                raise DataFileError(self.path, problem, "Save it again by save_pretrained(safe_serialization=True)")
            self._add_safetensors(self.path / SINGLE)
            return
        try:
            listed = json.loads((self.path / INDEX).read_text())["weight_map"]
            files = sorted(set(listed.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataFileError(self.path / INDEX, f"not an index of safetensors files ({error!r})", REMEDY) from error
        for file in files:
            if Path(file).name != file:
                raise DataFileError(self.path / INDEX, f"names '{file}', which is not in its folder", REMEDY)
            self._add_safetensors(self.path / file)
        missing = sorted(listed.keys() - self.specs.keys())
        if missing:
            raise DataFileError(self.path / INDEX, f"lists {missing[0]}, which no file holds", REMEDY)

    def _add_safetensors(self, path: Path) -> None:
        _begin(path)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                names = file.keys()
                _require_few(path, len(names))
                for name in names:
                    part = file.get_slice(name)
                    dtype = next((dtype for dtype, code in DTYPES.items() if code == part.get_dtype()), None)
                    if dtype is None:
                        raise DataFileError(
                            path, f"{name} holds {part.get_dtype()}, not floating-point weights", "Dequantise the model"
                        )
                    self.specs[name], self._files[name] = Spec(tuple(part.get_shape()), dtype), path
        except safetensors.SafetensorError as error:
            raise _damaged(path, error) from error


def write_weights(folder: Path, specs: dict[str, Spec], read: Callable[[str], Tensor]) -> None:
    """Write ``specs`` as safetensors files and their index into ``folder``; ``read`` is asked for one tensor at a time.

    By hand, as the library wants all tensors of a file in memory: a length, a header in JSON, the bytes.
    """
    shards: list[dict[str, Spec]] = [{}]
    for name, spec in specs.items():
        if shards[-1] and sum(map(_bytes, shards[-1].values())) + _bytes(spec) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = spec
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names if len(shards) > 1 else [SINGLE], shards, strict=True):
        _write_shard(folder / name, shard, read)
    if len(shards) > 1:
        index = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(map(_bytes, specs.values()))
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / INDEX).write_text(json.dumps(content, indent=1) + "\n")


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal. Raises DataFileError."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataFileError(path, f"cannot be read ({error.strerror})", "Check the path") from error


def _write_shard(path: Path, specs: dict[str, Spec], read: Callable[[str], Tensor]) -> None:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, spec in specs.items():
        stop = offset + _bytes(spec)
        header[name] = {"dtype": DTYPES[spec.dtype], "shape": spec.shape, "data_offsets": [offset, stop]}
        offset = stop
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    with open(path, "wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for name, spec in progress(specs.items(), f"writing {path.name}", "tensors"):
            tensor = read(name)
            if tensor.shape != spec.shape:
                raise ValueError(f"{name} has shape {list(tensor.shape)}, announced was {list(spec.shape)}")
            file.write(memoryview(tensor.to(spec.dtype).contiguous().view(torch.uint8).numpy()).cast("B"))


def _bytes(spec: Spec) -> int:
    return torch.Size(spec.shape).numel() * spec.dtype.itemsize


def _begin(path: str | Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(9)
    except OSError as error:
        raise DataFileError(path, f"cannot be read ({error.strerror})", "Check the path") from error


def _is_safetensors(path: str | Path) -> bool:
    return _begin(path)[8:] == b"{"


def _damaged(path: str | Path, error: Exception) -> DataFileError:
    return DataFileError(path, f"a truncated or damaged safetensors file ({error})", REMEDY)


def _tensors(path: str | Path, content: Mapping, wrappers: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights in ``content``, taken out of the first of ``wrappers`` that is there."""
    wrapper = next((name for name in wrappers if isinstance(content.get(name), Mapping)), None)
    tensors = content[wrapper] if wrapper else content
    if not wrapper and ("optimizer" in content or "param_groups" in content):
        raise DataFileError(path, "an optimizer file, not the weights of a model", "Pass the file of the model")
    odd = [name for name, value in tensors.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if odd or not tensors:
        what = f"holds {str(odd[0])!r:.60}, which is not a tensor" if odd else "holds no tensor"
        raise DataFileError(path, f"not a file of weights: it {what}", REMEDY)
    _require_few(path, len(tensors))
    if hollow := next((name for name, value in tensors.items() if not _filled(value)), None):
        raise DataFileError(path, f"{hollow} has more numbers than the file holds for it", REMEDY)
    return dict(tensors)


def _filled(tensor: Tensor) -> bool:
    """Whether every number of ``tensor`` has a place of its own: not so if it is expanded, sparse or on no device."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()


def _require_few(path: str | Path, tensors: int) -> None:
    if tensors > MAXIMUM_TENSORS:
        raise DataFileError(path, f"holds {tensors:,} tensors, more than {MAXIMUM_TENSORS:,}", REMEDY)


def _read_torch(path: str | Path) -> Mapping:
    _require_stored(path)
    try:
        # Mapped where the format allows: a training checkpoint's optimizer state is then never read.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            what = "an optimizer file: " if _names_parameter_groups(path) else ""
            problem = f"{what}refused: besides tensors it holds {found[1]}, and restoring that could run any program"
            remedy = "Save its state_dict alone, in the environment and with the trust that made the file"
            raise DataFileError(path, problem, "Pass the file of the model" if what else remedy) from error
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


def _require_stored(path: str | Path) -> None:
    """DataFileError for a zip file with compressed members, which may unpack to any size; torch.save writes none."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            packed = next((one for one in archive.infolist() if one.compress_type != zipfile.ZIP_STORED), None)
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise DataFileError(path, f"a truncated, damaged or foreign file ({error})", REMEDY) from error
    if packed:
        problem = f"{packed.filename} inside it is compressed, which torch.save never does"
        raise DataFileError(path, problem, REMEDY)


def _names_parameter_groups(path: str | Path) -> bool:
    """Whether a file that is not restored speaks of an optimizer's parameter groups and of no model's weights."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        content = b"".join(archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl"))
    return b"param_groups" in content and b"state_dict" not in content
