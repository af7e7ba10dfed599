"""The tools, the storage and the images of these tests, which only ``make test-images`` collects."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from images.containers import Containers, containers, missing
from images.pip_settings import PipSecrets, pip_secrets

FOLDER = Path(__file__).parent


def pytest_ignore_collect(collection_path, config):
    """True unless the command line names this folder or a test in it."""
    named = [(config.invocation_params.dir / name.partition("::")[0]).resolve() for name in config.args]
    return None if any(path.is_relative_to(FOLDER) for path in named) else True


@pytest.fixture(scope="session")
def storage() -> Iterator[Containers]:
    """Skipped where a tool is missing, and failed where the variable CI is set."""
    problem = missing()
    if problem:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(problem)
    with containers() as made:
        yield made


@pytest.fixture(scope="session")
def base(storage) -> str:
    """Name of the image that stands in for ``debian:bookworm-slim``, of which a registry would have to be asked."""
    return storage.make_base()


@pytest.fixture(scope="session")
def secrets(tmp_path_factory) -> Iterator[PipSecrets]:
    """The machine's pip settings while images are built."""
    with pip_secrets(tmp_path_factory.mktemp("secrets")) as made:
        yield made


@pytest.fixture(scope="session")
def cpu_image(storage, base, secrets, repository) -> tuple[str, str]:
    """Name of the CPU image, and the last line that ``make image`` printed: it holds the revision and the size."""
    options = ["--pull-never", "--build-arg", f"BASE={base}"]
    environment = {"PIP_CONF": str(secrets.conf), "PIP_CA": str(secrets.certificate)}
    output = storage.make("image", repository, options, **environment)
    return "localhost/megat2i:cpu", output.splitlines()[-1]
