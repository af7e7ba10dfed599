"""The process groups of a run: a mesh of pipeline x data x tensor ranks, tensor innermost (Megatron's order)."""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megat2i.config import ParallelConfig


@dataclass(frozen=True)
class ParallelGroups:
    """Process groups of this rank along each axis; every axis has a group, of one rank where it is not used."""

    mesh: DeviceMesh

    @staticmethod
    def create(parallel: ParallelConfig, device_type: str) -> "ParallelGroups":
        """Build the mesh over all ranks; every rank must call this. Data-parallel ranks are what is left over."""
        data = dist.get_world_size() // (parallel.tensor * parallel.pipeline)
        mesh = init_device_mesh(
            device_type, (parallel.pipeline, data, parallel.tensor), mesh_dim_names=("pipeline", "data", "tensor")
        )
        return ParallelGroups(mesh)

    @property
    def data(self) -> dist.ProcessGroup:
        return self.mesh.get_group("data")

    @property
    def data_rank(self) -> int:
        return self.mesh.get_local_rank("data")

    @property
    def data_size(self) -> int:
        return self.mesh["data"].size()

    def layout(self) -> str:
        """pipeline.tensor.data sizes, e.g. "1.1.8"."""
        return ".".join(str(self.mesh[axis].size()) for axis in ("pipeline", "tensor", "data"))
