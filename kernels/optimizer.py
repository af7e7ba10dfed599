"""Which fused AdamW to use: NVIDIA apex's FusedAdam where that is really installed, else PyTorch's.

The package called ``apex`` on the Python package index is another project; NVIDIA's is built from source.
"""

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch


class AdamW(NamedTuple):
    """How to build the optimizer, called as ``build(params, lr=, betas=, eps=, weight_decay=)``, and why this one."""

    build: Callable[..., torch.optim.Optimizer]
    name: str
    reason: str


def choose_adamw(device: torch.device) -> AdamW:
    """apex's FusedAdam on CUDA devices where NVIDIA's apex is installed with it, else PyTorch's fused AdamW."""
    problem = "no GPU" if device.type != "cuda" else apex_problem()
    if problem:
        return AdamW(_torch_adamw, "torch AdamW (fused)", problem)
    return AdamW(_apex_adamw, "apex FusedAdam", "NVIDIA apex is installed")


def apex_problem() -> str | None:
    """Why NVIDIA's apex cannot be used here; None where it can. Imports nothing of it."""
    spec = find_spec("apex")
    if spec is None:
        return "apex is not installed"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        return "the installed package apex is not NVIDIA's (the index has another project of that name)"
    if find_spec("amp_C") is None:
        return "NVIDIA apex is installed without its CUDA extensions"
    return None


def _torch_adamw(params, **options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, fused=True, **options)


def _apex_adamw(params, **options) -> torch.optim.Optimizer:
    return importlib.import_module("apex.optimizers").FusedAdam(params, adam_w_mode=True, **options)
