"""The engine on DeepSpeed's ZeRO-1: masters and moments sharded over the data-parallel ranks.

The only importer of deepspeed. Backward passes are plain autograd in our own schedule; ``managed_gradient_accumulation:
false`` makes one ``engine.step()`` the boundary (DeepSpeed >= 0.19.4). How ZeRO's flat partitions map to parameters:
``_hp_mapping`` of each parameter, checked at start and never taken on trust.
"""

import contextlib
import io
import logging
import os

import deepspeed
import torch

from megat2i.config import OptimizerConfig, TrainingConfig
from megat2i.kernels.optimizer import choose_adamw
from megat2i.model.gpt import GPT
from megat2i.optim.engine import EXP_AVG, EXP_AVG_SQ, WEIGHT, Fragment, first_of_tensor_copies, frozen_weights
from megat2i.topology import ModelParallelUnit, ParallelGroups

REDUCE_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


class DeepSpeedEngine:
    """ZeRO-1 AdamW. DeepSpeed averages gradients over data-parallel ranks, hence ``loss_scale`` = their number."""

    def __init__(
        self,
        model: GPT,
        optimizer: OptimizerConfig,
        training: TrainingConfig,
        groups: ParallelGroups,
        local_rank: int = 0,
    ):
        deepspeed.utils.logger.setLevel(logging.WARNING)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, shard in model.shards().items():
            if name in parameters and not shard.is_whole:  # by this DeepSpeed counts what it adds up to the norm
                parameters[name].tensor_model_parallel = True
        bfloat16 = next(iter(parameters.values())).dtype == torch.bfloat16
        adam = choose_adamw(next(model.parameters()).device, for_deepspeed=True).build(
            list(parameters.values()),
            lr=optimizer.lr,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
        )
        accumulation = training.global_batch_size // (training.micro_batch_size * groups.data_size)
        settings = {
            "train_micro_batch_size_per_gpu": training.micro_batch_size,
            "gradient_accumulation_steps": accumulation,
            "managed_gradient_accumulation": False,
            "gradient_clipping": optimizer.clip,
            "zero_optimization": {"stage": 1, "overlap_comm": False},
            "zero_allow_untested_optimizer": False,
            "bf16": {"enabled": bfloat16, "immediate_grad_update": bfloat16},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": REDUCE_DTYPES[optimizer.reduce_dtype],
        }
        # A C++ op for inference on CPUs, compiled at the first start of DeepSpeed: training never calls it, and a build
        # that was killed leaves a lock on which every later start waits for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # DeepSpeed insists on the variable, which srun and a process without a launcher do not set.
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
        with contextlib.redirect_stdout(io.StringIO()):  # memory figures that it prints whatever the log level
            self.engine, *_ = deepspeed.initialize(
                model=model, optimizer=adam, config=settings, mpu=ModelParallelUnit(groups)
            )
        self.loss_scale = float(groups.data_size)
        self.updates = 0
        self.zero = self.engine.optimizer
        self.adam = self.zero.optimizer
        self.parameters, self.shards, self.groups = parameters, model.shards(), groups
        self.frozen = frozen_weights(model, self.shards, groups)
        self.masters = self.zero.fp32_groups_flat_partition if bfloat16 else self.zero.single_partition_of_fp32_groups
        if len(self.masters) != 1:
            raise RuntimeError(f"expected one parameter group in ZeRO, found {len(self.masters)}")
        self._check_mapping(self.zero.group_paddings[0] if bfloat16 else self.zero.groups_padding[0])

    def step(self, lr: float) -> float:
        """See ``Engine.step``."""
        self.adam.param_groups[0]["lr"] = lr
        skipped = self.engine.skipped_steps
        self.engine.step()
        if self.engine.skipped_steps == skipped:
            self.updates += 1
        return float(self.engine.get_global_grad_norm())

    def fragments(self) -> list[Fragment]:
        """See ``Engine.fragments``: each parameter's part of this rank's flat partition."""
        master = self.masters[0]
        state = self.adam.state[master]
        if EXP_AVG not in state:  # before the first update
            state["step"] = torch.tensor(0.0, device=master.device)
            state[EXP_AVG], state[EXP_AVG_SQ] = torch.zeros_like(master), torch.zeros_like(master)
        sources = ((WEIGHT, master.data), (EXP_AVG, state[EXP_AVG]), (EXP_AVG_SQ, state[EXP_AVG_SQ]))
        fragments = list(self.frozen)
        for name, _, in_parameter, in_flat in self._owned():
            shard = self.shards[name]
            written = first_of_tensor_copies(shard, self.groups)
            for kind, flat in sources:
                values = flat.narrow(0, in_flat.start, in_flat.numel)
                fragments.append(Fragment(name, kind, shard, in_parameter.start, values, written))
        return fragments

    @torch.no_grad()
    def loaded(self, updates: int) -> None:
        """See ``Engine.loaded``: links the new moments and refreshes the weights from the masters."""
        self.fragments()  # creates the moments on ranks that own only padding
        self.adam.state[self.masters[0]]["step"].fill_(updates)
        self.zero._hp_optimizer_states_linked = False
        self.zero._lazy_init_hp_params_optimizer_state()
        self.zero.update_lp_params()
        self.zero.zero_grad()
        self.adam.param_groups[0]["step"] = updates  # where apex counts
        self.updates = updates

    def _owned(self):
        """(name, parameter, place in the parameter, place in the flat partition) of what this rank owns."""
        for name, parameter in self.parameters.items():
            mapping = parameter._hp_mapping
            if mapping is not None:
                yield name, parameter, mapping.lp_fragment_address, mapping.hp_fragment_address

    def _check_mapping(self, padding: int) -> None:
        flat, owned = self.masters[0].data, 0
        for name, parameter, in_parameter, in_flat in self._owned():
            mine = parameter.data.flatten().narrow(0, in_parameter.start, in_parameter.numel).float()
            master = flat.narrow(0, in_flat.start, in_flat.numel)
            if not torch.equal(mine, master.to(parameter.dtype).float()):
                raise RuntimeError(f"DeepSpeed's map of parameter {name} does not match its flat partition")
            owned += in_flat.numel
        if owned + padding < flat.numel() or owned > flat.numel():
            raise RuntimeError(f"DeepSpeed's map covers {owned} of {flat.numel()} elements, {padding} of them padding")
