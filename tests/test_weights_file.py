"""Weight files tensor by tensor: what is read, what is written, how much memory it takes, what is refused."""

import json
import subprocess
import sys
import zipfile

import pytest
import safetensors.torch
import torch

from megat2i import weights_file
from megat2i.files import DataFileError, pending_folder
from megat2i.weights_file import Spec, WeightFiles, read_checkpoint, write_weights

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.randn(5, generator=torch.Generator().manual_seed(0)),
    "c": torch.randn(4, 2, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "d": torch.ones(1, 1).half(),
}
SPECS = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("form", ["zip", "wrapped", "legacy", "safetensors", "folder", "shards"])
def test_every_form_gives_the_same_tensors(tmp_path, form, monkeypatch):
    path = tmp_path / "x"
    if form == "safetensors":
        safetensors.torch.save_file(TENSORS, path)
    elif form in ("folder", "shards"):
        monkeypatch.setattr(weights_file, "SHARD_BYTES", 30 if form == "shards" else 10**9)
        path.mkdir()
        write_weights(path, SPECS, TENSORS.__getitem__)
        assert len(list(path.glob("*.safetensors"))) == (3 if form == "shards" else 1)
    else:
        content = {"epoch": 1, "state_dict": TENSORS} if form == "wrapped" else TENSORS
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    files = WeightFiles(path)
    assert files.specs == SPECS
    for name, tensor in TENSORS.items():
        assert torch.equal(files.read(name), tensor) and files.read(name).dtype == tensor.dtype


def test_what_is_written_is_what_the_library_writes(tmp_path):
    write_weights(tmp_path, SPECS, TENSORS.__getitem__)
    content = (tmp_path / "model.safetensors").read_bytes()
    loaded = safetensors.torch.load(content)
    assert list(loaded) and all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    assert int.from_bytes(content[:8], "little") % 8 == 0
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # without it transformers refuses the file


def test_a_tensor_of_another_shape_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="a has shape"):
        write_weights(tmp_path, SPECS | {"a": Spec((3, 2), torch.float32)}, TENSORS.__getitem__)


@pytest.mark.parametrize(
    ("index", "problem"),
    [
        ("{", "not an index"),
        ('{"weight_map": 3}', "not an index"),
        ('{"weight_map": {"a": "../other.safetensors"}}', "not in its folder"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors: cannot be read"),
        ('{"weight_map": {"a": "model.safetensors", "z": "model.safetensors"}}', "lists z, which no file holds"),
    ],
)
def test_a_wrong_index_is_one_error(tmp_path, index, problem):
    safetensors.torch.save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(DataFileError, match=problem):
        WeightFiles(tmp_path)


def test_wrong_files_are_one_error(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(DataFileError, match=r"model.safetensors: cannot be read \(No such file"):
        WeightFiles(tmp_path)
    safetensors.torch.save_file({"a": torch.ones(2, dtype=torch.int8)}, path)
    with pytest.raises(DataFileError, match="a holds I8, not floating-point weights"):
        WeightFiles(tmp_path)
    safetensors.torch.save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataFileError, match="truncated or damaged"):
        WeightFiles(tmp_path)
    torch.save({"optimizer": {"state": {}, "param_groups": []}}, tmp_path / "optimizer_1.pt")
    with pytest.raises(DataFileError, match="an optimizer file"):
        WeightFiles(tmp_path / "optimizer_1.pt")


def test_a_folder_has_its_name_when_it_is_complete(tmp_path):
    with pending_folder(tmp_path / "x") as pending:
        (pending / "a").write_text("1")
        (pending / "sub").mkdir()
        (pending / "sub" / "b").write_text("2")
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x" / "a").read_text() == "1"
    with pytest.raises(KeyError), pending_folder(tmp_path / "y") as pending:
        (pending / "a").write_text("1")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    with pytest.raises(DataFileError, match="exists already"), pending_folder(tmp_path / "x"):
        pass


CONVERT = """
import json, sys
import torch
from megat2i import weights_file
from megat2i.model import open_lm, weights
path, out, whole, params = sys.argv[1], sys.argv[2], sys.argv[3] == "whole", json.loads(sys.argv[4])
weights_file.SHARD_BYTES = 40_000_000
from pathlib import Path
weights.sizes(open_lm.model_shape(params), 8)
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
open("/proc/self/clear_refs", "w").write("5")  # forget the peak of the imports
before = status("VmRSS")
source = open_lm.open_weights(path, params)
if whole:
    kept = {name: source.read(name) for name in source.dtypes}
weights.save(source, Path(out), {})
print(status("VmHWM") - before)
"""


@pytest.mark.parametrize("form", ["torch", "safetensors"])
def test_a_conversion_takes_less_memory_than_one_shard(tmp_path, form):
    """Measured as peak resident memory, mapped pages included, of a model of five shards of 40 MB."""
    from megat2i.model import open_lm, weights

    params = open_lm.RELEASED_1B | {"dim": 512, "n_layers": 14, "n_heads": 8, "vocab_size": 4096}
    tensors = {name: torch.rand(size) for name, size in weights.sizes(open_lm.model_shape(params), 4096).items()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert total > 5 * 40_000_000
    path = tmp_path / "epoch_1.pt"
    safetensors.torch.save_file(tensors, path) if form == "safetensors" else torch.save(tensors, path)
    expected, name = tensors["norm.bias"], "norm.bias"
    del tensors

    def measured(how):
        command = [sys.executable, "-c", CONVERT, str(path), str(tmp_path / how), how, json.dumps(params)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    streamed = measured("streamed")
    assert streamed < 40_000_000
    assert torch.equal(weights.load(tmp_path / "streamed").read(name), expected)
    assert measured("whole") > total - 40_000_000


def refused_by_both_readers(path, match):
    for read in (read_checkpoint, WeightFiles):
        with pytest.raises(DataFileError, match=match):
            read(path)


def test_compressed_members_of_a_zip_are_refused_unread(tmp_path):
    torch.save({"a": torch.zeros(4)}, tmp_path / "plain")
    with zipfile.ZipFile(tmp_path / "plain") as plain, zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_DEFLATED) as z:
        for name in plain.namelist():
            z.writestr(name, plain.read(name) + bytes(10**7 if name.endswith("data.pkl") else 0))
    refused_by_both_readers(tmp_path / "x", "data.pkl inside it is compressed, which torch.save never does")


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(10**12), torch.zeros(10**10, device="meta"), torch.eye(3).to_sparse()],
    ids=["expanded", "meta", "sparse"],
)
def test_tensors_without_their_numbers_are_refused(tmp_path, tensor):
    torch.save({"a": tensor}, tmp_path / "x")
    refused_by_both_readers(tmp_path / "x", "a has more numbers than the file holds for it|holds 'a'|foreign file")


def test_hundreds_of_thousands_of_tensors_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(weights_file, "MAXIMUM_TENSORS", 3)
    safetensors.torch.save_file(TENSORS, tmp_path / "x")
    refused_by_both_readers(tmp_path / "x", "holds 4 tensors, more than 3")
    torch.save(TENSORS, tmp_path / "y")
    refused_by_both_readers(tmp_path / "y", "holds 4 tensors, more than 3")
