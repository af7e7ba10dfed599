"""The process groups of a run: a mesh of pipeline x data x tensor ranks, tensor innermost (Megatron's order)."""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megat2i.config import ParallelConfig
from megat2i.runtime import COLLECTIVE_TIMEOUT


@dataclass(frozen=True)
class ParallelGroups:
    """Process group, rank and size along every axis of the mesh; each axis has a group, of one rank if it is not used.

    ``model``: all pipeline and tensor ranks that hold one copy of the model together. ``pipeline_back``: the pipeline
    ranks once more, for gradients: with NCCL the messages of a group between two ranks are one queue, in which an
    activation would wait behind a gradient.
    """

    pipeline: ProcessGroup
    pipeline_back: ProcessGroup | None
    data: ProcessGroup
    tensor: ProcessGroup
    model: ProcessGroup

    @staticmethod
    def create(parallel: ParallelConfig) -> "ParallelGroups":
        """Build the groups over all ranks; every rank must call this. Data-parallel ranks are what is left over."""
        pipeline, tensor = parallel.pipeline, parallel.tensor
        data = dist.get_world_size() // (tensor * pipeline)

        def rank_of(stage: int, replica: int, share: int) -> int:
            return (stage * data + replica) * tensor + share

        stages, replicas, shares = range(pipeline), range(data), range(tensor)
        columns = [[rank_of(p, d, t) for p in stages] for d in replicas for t in shares]
        return ParallelGroups(
            pipeline=_group_of_mine(columns),
            pipeline_back=_group_of_mine(columns) if pipeline > 1 else None,
            data=_group_of_mine([[rank_of(p, d, t) for d in replicas] for p in stages for t in shares]),
            tensor=_group_of_mine([[rank_of(p, d, t) for t in shares] for p in stages for d in replicas]),
            model=_group_of_mine([[rank_of(p, d, t) for p in stages for t in shares] for d in replicas]),
        )

    @property
    def pipeline_rank(self) -> int:
        return self.pipeline.rank()

    @property
    def pipeline_size(self) -> int:
        return self.pipeline.size()

    @property
    def data_rank(self) -> int:
        return self.data.rank()

    @property
    def data_size(self) -> int:
        return self.data.size()

    @property
    def tensor_rank(self) -> int:
        return self.tensor.rank()

    @property
    def tensor_size(self) -> int:
        return self.tensor.size()

    def layout(self) -> str:
        """pipeline.tensor.data sizes, e.g. "1.1.8"."""
        return f"{self.pipeline_size}.{self.tensor_size}.{self.data_size}"


def _group_of_mine(partition: list[list[int]]) -> ProcessGroup:
    """The group of this rank in a ``partition`` of all ranks; collective."""
    mine = None
    for ranks in partition:  # every rank takes part in making every group, in the same order
        group = dist.new_group(ranks, timeout=COLLECTIVE_TIMEOUT)
        if dist.get_rank() in ranks:
            mine = group
    return mine


class ModelParallelUnit:
    """The groups under the names by which DeepSpeed asks for them (its ``mpu`` argument).

    Its "model parallel" group is all ranks of one copy of the model: over it the gradient norm is summed.
    """

    def __init__(self, groups: ParallelGroups):
        self.groups = groups

    def get_model_parallel_group(self) -> ProcessGroup:
        return self.groups.model

    def get_model_parallel_rank(self) -> int:
        return self.groups.model.rank()

    def get_model_parallel_world_size(self) -> int:
        return self.groups.model.size()

    def get_tensor_model_parallel_group(self) -> ProcessGroup:
        return self.groups.tensor

    def get_tensor_model_parallel_rank(self) -> int:
        return self.groups.tensor_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.groups.tensor_size

    def get_pipeline_model_parallel_rank(self) -> int:
        return self.groups.pipeline_rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self.groups.pipeline_size

    def get_data_parallel_group(self) -> ProcessGroup:
        return self.groups.data

    def get_data_parallel_rank(self) -> int:
        return self.groups.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.groups.data_size
