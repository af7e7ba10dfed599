"""The engine in plain PyTorch: the twin that DeepSpeed is compared with, and the engine of single-process runs.

With bfloat16 weights it keeps float32 masters; gradients are summed in float32 in any case.
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megat2i.config import OptimizerConfig, TrainingConfig
from megat2i.kernels.optimizer import choose_adamw
from megat2i.model.gpt import GPT
from megat2i.optim.engine import EXP_AVG, EXP_AVG_SQ, WEIGHT, Fragment, first_of_tensor_copies, frozen_weights
from megat2i.optim.gradients import GradientSums
from megat2i.runtime import DTYPES
from megat2i.topology import ParallelGroups


class TorchEngine:
    """AdamW on every trainable parameter of ``model``; gradients summed over the data-parallel ranks."""

    loss_scale = 1.0

    def __init__(self, model: GPT, optimizer: OptimizerConfig, training: TrainingConfig, groups: ParallelGroups):
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shards = model.shards()
        self.frozen = frozen_weights(model, self.shards, groups)
        self.masters = {
            name: p.data if p.dtype == torch.float32 else p.data.float() for name, p in self.parameters.items()
        }
        micro_batches = training.global_batch_size // (training.micro_batch_size * groups.data_size)
        self.sums = GradientSums(self.parameters, micro_batches, groups.data, DTYPES[optimizer.reduce_dtype])
        self.gradients = self.sums.of
        for name, master in self.masters.items():
            master.grad = self.gradients[name]
        self.adam = choose_adamw(next(model.parameters()).device).build(
            list(self.masters.values()),
            lr=optimizer.lr,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )
        self.clip, self.groups, self.updates = optimizer.clip, groups, 0

    @torch.no_grad()
    def step(self, lr: float, accept: Callable[[float], bool] | None = None) -> float:
        """See ``Engine.step``."""
        self.sums.reduce()
        norm = self._norm()
        grad_norm = norm.item()
        if math.isfinite(grad_norm) and (accept is None or accept(grad_norm)):
            if self.clip > 0:
                nn.utils.clip_grads_with_norm_(self.masters.values(), self.clip, norm)
            self.adam.param_groups[0]["lr"] = lr
            self.adam.step()
            self.updates += 1
            self._refresh()
        self.sums.zero()
        return grad_norm

    def _norm(self) -> Tensor:
        """The norm of the whole model's gradient; of equal copies on tensor-parallel ranks one counts."""
        groups = self.groups
        counted = [g for name, g in self.gradients.items() if first_of_tensor_copies(self.shards[name], groups)]
        norm = nn.utils.get_total_norm(counted).to(self.sums.buckets[0].device)  # of nothing, it is on the CPU
        if groups.model.size() == 1:
            return norm
        square = norm.double().square()
        dist.all_reduce(square, group=groups.model)
        return square.sqrt().float()

    def fragments(self) -> list[Fragment]:
        """See ``Engine.fragments``: data-parallel ranks hold copies, the first one writes them."""
        fragments = list(self.frozen)
        for name, master in self.masters.items():
            shard, state = self.shards[name], self._state(master)
            written = self.groups.data_rank == 0 and first_of_tensor_copies(shard, self.groups)
            for kind, tensor in ((WEIGHT, master), (EXP_AVG, state[EXP_AVG]), (EXP_AVG_SQ, state[EXP_AVG_SQ])):
                fragments.append(Fragment(name, kind, shard, 0, tensor.view(-1), written))
        return fragments

    @torch.no_grad()
    def loaded(self, updates: int) -> None:
        """See ``Engine.loaded``."""
        for master in self.masters.values():
            self._state(master)["step"].fill_(updates)
        self.adam.param_groups[0]["step"] = updates  # where apex counts
        self.updates = updates
        self._refresh()

    def _state(self, master: Tensor) -> dict[str, Tensor]:
        state = self.adam.state[master]
        if not state:  # before the first update
            state["step"] = torch.tensor(0.0, device=master.device)
            state[EXP_AVG], state[EXP_AVG_SQ] = torch.zeros_like(master), torch.zeros_like(master)
        return state

    def _refresh(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter.data_ptr() != self.masters[name].data_ptr():
                parameter.data.copy_(self.masters[name])
