"""The import check of the images: a library that is required must be there and must import."""

import subprocess
import sys

import pytest

from megat2i.kernels.libraries import LibraryError, describe_libraries, require_library


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Function of {file name: source} that puts these files first on the path."""
    monkeypatch.syspath_prepend(tmp_path)
    names = {"flash_attn", "flash_attn_2_cuda", "apex", "apex.optimizers", "apex.optimizers.fused_adam", "amp_C"}
    before = {name: sys.modules.pop(name) for name in names & sys.modules.keys()}

    def make(files):
        for file, source in files.items():
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(source)

    yield make
    for name in names & sys.modules.keys():  # else other tests would find these
        del sys.modules[name]
    sys.modules.update(before)


def test_flash_attn_that_imports(package):
    package({"flash_attn/__init__.py": "", "flash_attn_2_cuda.py": ""})
    require_library("flash-attn")
    assert "flash-attn            of an unknown version" in describe_libraries()


def test_flash_attn_of_another_torch(package):
    package({"flash_attn/__init__.py": "", "flash_attn_2_cuda.py": "raise ImportError('undefined symbol: aten')"})
    with pytest.raises(LibraryError, match="flash-attn is installed and cannot be imported: undefined symbol: aten"):
        require_library("flash-attn")


def test_nvidias_apex_that_imports(package):
    package({"apex/__init__.py": "", "apex/optimizers/__init__.py": "from . import fused_adam", "amp_C.py": ""})
    package({"apex/optimizers/fused_adam.py": ""})
    require_library("apex")


def test_the_other_apex(package):
    package({"apex/__init__.py": "", "apex/api.py": ""})
    with pytest.raises(LibraryError, match="not NVIDIA's"):
        require_library("apex")


def test_unknown_library():
    with pytest.raises(LibraryError, match="'flash' is not one of triton, flash-attn, apex"):
        require_library("flash")


def test_the_command_fails_where_a_library_is_absent():
    """In one sentence, behind the table."""
    run = subprocess.run([sys.executable, "-m", "megat2i.kernels", "apex"], capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr == "error: apex is not installed\n"
    assert "AdamW                 torch AdamW (fused)" in run.stdout or "CUDA" in run.stdout
