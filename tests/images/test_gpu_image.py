"""The GPU image: every package that its build installs is pinned; with --full it is built and run on the CPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from images.pip_settings import pip_secrets

LOCKS = ("constraints.txt", "docker/constraints-gpu.txt")
COMPILER = "cuda-toolkit[nvcc,cccl,crt,nvvm,cudart]"


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(repository: Path) -> dict[str, str]:
    """{package: version} of both lock files."""
    lines = [line for lock in LOCKS for line in (repository / lock).read_text().splitlines()]
    return {canonical(name): version for name, _, version in (line.partition("==") for line in lines) if version}


def resolve(repository: Path, folder: Path, *packages: str) -> dict[str, str]:
    """{package: version} that pip would install of ``packages`` into an empty environment, from the index alone."""
    constraints = [word for lock in LOCKS for word in ("--constraint", str(repository / lock))]
    report = folder / "report.json"
    # Not isolated: the sources of flash-attn and DeepSpeed ask torch for their metadata. Nothing is compiled.
    options = ["--quiet", "--dry-run", "--ignore-installed", "--no-build-isolation", f"--report={report}"]
    with pip_secrets(folder, local=False) as secrets:
        conf = folder / "machine.conf"
        conf.write_text(secrets.conf.read_text().replace("/run/secrets/ca", str(secrets.certificate)))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        environment |= {"PIP_CONFIG_FILE": os.devnull, "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}
        environment |= pip_environment(conf)
        command = [sys.executable, "-m", "pip", "install", *options, *constraints, *packages]
        subprocess.run(command, check=True, env=environment)
    installed = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    return {canonical(package["name"]): package["version"] for package in installed}


def pip_environment(conf: Path) -> dict[str, str]:
    """The options of a pip.conf as variables: a file named by PIP_CONFIG_FILE is read beside the machine's."""
    pairs = [line.split(" = ", 1) for line in conf.read_text().splitlines() if " = " in line]
    return {f"PIP_{name.upper().replace('-', '_')}": value for name, value in pairs}


def test_every_package_is_pinned(repository, tmp_path):
    """Of the image with all of its extensions, the compiler's packages included."""
    listing = subprocess.check_output(
        [sys.executable, "docker/requirements.py", "pyproject.toml", "gpu,serve,flash"], cwd=repository, text=True
    )
    resolved = resolve(repository, tmp_path, *listing.splitlines(), COMPILER, "pip", "setuptools", "wheel")
    print("\n".join(f"{name}=={version}" for name, version in sorted(resolved.items())))
    pinned = pins(repository)
    assert {name: version for name, version in resolved.items() if pinned.get(name) != version} == {}
    assert {"torch", "triton", "deepspeed", "flash-attn", "nvidia-nccl-cu13", "nvidia-cuda-nvcc"} <= set(resolved)


def test_the_compiler_is_the_one_that_is_built_with(repository):
    assert f'"{COMPILER}"' in (repository / "docker/gpu.Dockerfile").read_text()


@pytest.mark.full
def test_build_and_table_of_the_kernels(storage, base, repository, tmp_path):
    """Every stage, without extensions, and its import check; Triton's compiler is there."""
    with pip_secrets(tmp_path, local=False) as secrets:
        options = ["--pull-never", "--build-arg", f"BASE={base}"]
        environment = {"PIP_CONF": str(secrets.conf), "PIP_CA": str(secrets.certificate)}
        print(storage.make("image-gpu", repository, options, **environment).splitlines()[-1])
    done = storage.run("localhost/megat2i:gpu", "python", "-m", "megat2i.kernels", "triton")
    assert done.returncode == 0, done.stderr
    assert "AdamW                 torch AdamW (fused)" in done.stdout
    assert storage.run("localhost/megat2i:gpu", "gcc", "--version").returncode == 0
