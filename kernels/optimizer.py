"""Which fused AdamW to use: NVIDIA apex's FusedAdam where that is really installed, else PyTorch's.

The package called ``apex`` on the Python package index is another project; NVIDIA's is built from source.
"""

import importlib
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw


class AdamW(NamedTuple):
    """How to build the optimizer, called as ``build(params, lr=, betas=, eps=, weight_decay=)``, and why this one."""

    build: Callable[..., object]  # with ``param_groups``, ``state`` and ``step`` as torch.optim.Optimizer has them
    name: str
    reason: str


def choose_adamw(device: torch.device, for_deepspeed: bool = False) -> AdamW:
    """apex's FusedAdam on CUDA devices where NVIDIA's apex is installed with it, else PyTorch's fused AdamW.

    ``for_deepspeed``: which takes nothing but a ``torch.optim.Optimizer``.
    """
    problem = "no GPU" if device.type != "cuda" else apex_problem()
    if problem:
        return AdamW(_torch_adamw if for_deepspeed else FusedAdamW, "torch AdamW (fused)", problem)
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


class FusedAdamW:
    """``torch.optim.AdamW(fused=True)`` without its base class, which imports PyTorch's compiler: a second of start-up.

    The same fused update on the same state: ``state[parameter]`` has step, exp_avg and exp_avg_sq.
    """

    def __init__(self, params: list[Tensor], lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        group = {"params": params, "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.param_groups = [group]
        self.state: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        group = self.param_groups[0]
        params = [parameter for parameter in group["params"] if parameter.grad is not None]
        states = [self._state(parameter) for parameter in params]
        adamw(
            params,
            [parameter.grad for parameter in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],  # no AMSGrad
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state


def _torch_adamw(params, **options) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, fused=True, **options)


def _apex_adamw(params, **options) -> object:
    return importlib.import_module("apex.optimizers").FusedAdam(params, adam_w_mode=True, **options)
