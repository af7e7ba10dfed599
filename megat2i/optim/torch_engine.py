"""The engine in plain PyTorch: the twin that DeepSpeed is compared with, and the engine of single-process runs.

With bfloat16 weights it keeps float32 masters and adds every micro-batch's gradient to a float32 sum at once.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megat2i.config import OptimizerConfig
from megat2i.optim.engine import EXP_AVG, EXP_AVG_SQ, WEIGHT, Fragment
from megat2i.topology import ParallelGroups


class TorchEngine:
    """AdamW on every trainable parameter of ``model``; gradients summed over the data-parallel ranks."""

    loss_scale = 1.0

    def __init__(self, model: nn.Module, optimizer: OptimizerConfig, groups: ParallelGroups):
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = {
            name: p.data if p.dtype == torch.float32 else p.data.float() for name, p in self.parameters.items()
        }
        self.gradients = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(self._adder(self.gradients[name]))
        for name, master in self.masters.items():
            master.grad = self.gradients[name]
        self.adam = torch.optim.AdamW(
            list(self.masters.values()),
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        self.clip, self.groups, self.updates = optimizer.clip, groups, 0

    @staticmethod
    def _adder(total: Tensor):
        def add(parameter: nn.Parameter) -> None:
            total.add_(parameter.grad)
            parameter.grad = None

        return add

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """See ``Engine.step``."""
        gradients = list(self.gradients.values())
        if self.groups.data_size > 1:
            pending = [dist.all_reduce(gradient, group=self.groups.data, async_op=True) for gradient in gradients]
            for work in pending:
                work.wait()
        norm = nn.utils.get_total_norm(gradients)
        grad_norm = norm.item()
        if torch.isfinite(norm):
            if self.clip > 0:
                nn.utils.clip_grads_with_norm_(self.masters.values(), self.clip, norm)
            self.adam.param_groups[0]["lr"] = lr
            self.adam.step()
            self.updates += 1
            self._refresh()
        for gradient in gradients:
            gradient.zero_()
        return grad_norm

    def fragments(self) -> list[Fragment]:
        """See ``Engine.fragments``: data-parallel ranks hold copies, the first one owns them."""
        if self.groups.data_rank != 0:
            return []
        fragments = []
        for name, master in self.masters.items():
            shape, state = tuple(master.shape), self._state(master)
            for kind, tensor in ((WEIGHT, master), (EXP_AVG, state[EXP_AVG]), (EXP_AVG_SQ, state[EXP_AVG_SQ])):
                fragments.append(Fragment(name, kind, shape, 0, tensor.view(-1)))
        return fragments

    @torch.no_grad()
    def loaded(self, updates: int) -> None:
        """See ``Engine.loaded``: the first data-parallel rank read the state, the others receive it."""
        for master in self.masters.values():
            state = self._state(master)
            state["step"].fill_(updates)
            for tensor in (master, state[EXP_AVG], state[EXP_AVG_SQ]):
                dist.broadcast(tensor, group=self.groups.data, group_src=0)
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
