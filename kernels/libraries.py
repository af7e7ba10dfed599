"""The optional libraries of the kernels: which are installed, and whether they can be imported."""

import importlib
from importlib import metadata
from importlib.util import find_spec

from megat2i.kernels.optimizer import apex_problem

# What the kernels import of each: the module in Python and, where there is one, the compiled one.
MODULES = {
    "triton": ("triton",),
    "flash-attn": ("flash_attn", "flash_attn_2_cuda"),
    "apex": ("apex.optimizers", "amp_C"),
}


class LibraryError(Exception):
    """A library cannot be used here; the message names it and says why."""


def require_library(name: str) -> None:
    """Import the library ``name``. Raises LibraryError where it is unknown, absent or broken."""
    if name not in MODULES:
        raise LibraryError(f"'{name}' is not one of {', '.join(MODULES)}")
    problem = _absence(name)
    if problem:
        raise LibraryError(problem)
    try:
        for module in MODULES[name]:
            importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise LibraryError(f"{name} is installed and cannot be imported: {error}") from error


def describe_libraries() -> str:
    """One line for each library: its version, or why it is not used. Imports none of them."""
    return "\n".join(f"  {name:22}{_absence(name) or _version(name)}" for name in MODULES)


def _absence(name: str) -> str | None:
    """Why a library is not there; None where it is."""
    if name == "apex":
        return apex_problem()
    return f"{name} is not installed" if find_spec(MODULES[name][-1]) is None else None


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "of an unknown version"
