"""Where a run executes: the launcher's environment, explicit wishes, and the process group."""

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from launched import SRUN

from megat2i.config import ConfigError, ParallelConfig
from megat2i.runtime import WITHOUT_BFLOAT16, Backend, fast_bfloat16
from megat2i.topology import ParallelGroups

DEEPSPEED = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"}
TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("variables", "launcher", "engine"),
    [(DEEPSPEED, "deepspeed", "deepspeed"), (TORCHRUN, "torchrun", "torch"), (SRUN, "slurm", "torch")],
)
def test_launchers(environment, tiny_config, variables, launcher, engine):
    environment(**variables)
    backend = Backend.resolve(tiny_config)
    assert (backend.launcher, backend.engine) == (launcher, engine)
    assert (backend.rank, backend.local_rank, backend.world_size) == (3, 1, 4)
    assert (backend.device, backend.dtype, backend.communication) == (torch.device("cpu"), torch.float32, "gloo")


def test_a_single_process_and_an_explicit_engine(environment, tiny_config):
    environment()
    backend = Backend.resolve(tiny_config)
    assert (backend.launcher, backend.engine, backend.rank, backend.world_size) == ("none", "torch", 0, 1)
    wish = replace(tiny_config, optimizer=replace(tiny_config.optimizer, engine="deepspeed"))
    assert Backend.resolve(wish).engine == "deepspeed"
    environment(**DEEPSPEED)
    wish = replace(tiny_config, optimizer=replace(tiny_config.optimizer, engine="torch"))
    assert Backend.resolve(wish).engine == "torch"


@pytest.mark.parametrize(("devices", "index"), [(1, 0), (2, 1)])
def test_one_visible_gpu_is_the_tasks_own(environment, tiny_config, monkeypatch, devices, index):
    environment(**SRUN)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    wish = replace(tiny_config, runtime=replace(tiny_config.runtime, device="cuda"))
    assert Backend.resolve(wish).device == torch.device("cuda", index)


@pytest.mark.parametrize("change", [{"LOCAL_RANK": None}, {"RANK": "x"}, {"WORLD_SIZE": ""}])
def test_a_broken_environment_is_one_clear_error(environment, tiny_config, change):
    variables = {name: value for name, value in (TORCHRUN | change).items() if value is not None}
    environment(**variables)
    with pytest.raises(ConfigError, match=next(iter(change))):
        Backend.resolve(tiny_config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_cuda_that_is_asked_for_but_missing_is_an_error(environment, tiny_config):
    environment()
    wish = replace(tiny_config, runtime=replace(tiny_config.runtime, device="cuda"))
    with pytest.raises(ConfigError, match=r"runtime\.device=cpu"):
        Backend.resolve(wish)
    automatic = replace(tiny_config, runtime=replace(tiny_config.runtime, device="auto"))
    assert Backend.resolve(automatic).device.type == "cpu"


def test_start_seeds_and_joins(environment, tiny_config):
    environment()

    def run():
        dist.destroy_process_group()  # the helper's
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE"):
            os.environ.pop(name)
        backend = Backend.resolve(tiny_config)
        backend.start(11)
        first = torch.rand(1).item()
        assert first == torch.rand(1, generator=torch.Generator().manual_seed(11)).item()
        assert dist.get_world_size() == 1 and torch.get_num_threads() == 1
        line = backend.describe()
        assert "device=cpu" in line and "engine=torch" in line and "\n" not in line

    run_ranks(1, run)


def test_groups_of_two_data_parallel_ranks():
    def run():
        groups = ParallelGroups.create(ParallelConfig())
        total = torch.tensor([10.0 ** dist.get_rank()])
        dist.all_reduce(total, group=groups.data)
        return groups.data_rank, groups.data_size, groups.layout(), total.item()

    assert run_ranks(2, run) == [(0, 2, "1.1.2", 11.0), (1, 2, "1.1.2", 11.0)]


def test_tensor_parallel_ranks_are_innermost():
    def run():
        groups = ParallelGroups.create(ParallelConfig(tensor=2))
        return groups.data_rank, groups.data_size, groups.layout(), sorted(dist.get_process_group_ranks(groups.data))

    ranks = run_ranks(4, run)
    assert [r[0] for r in ranks] == [0, 0, 1, 1] and {r[1:3] for r in ranks} == {(2, "1.2.2")}
    assert [r[3] for r in ranks] == [[0, 2], [1, 3], [0, 2], [1, 3]]


@pytest.fixture
def new_processor(monkeypatch):
    """A processor with AMX, whose instructions nothing hides."""
    for name in WITHOUT_BFLOAT16:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)


def automatic(config):
    return replace(config, runtime=replace(config.runtime, dtype="auto"))


def test_auto_is_bfloat16_where_the_processor_multiplies_it(environment, tiny_config, new_processor, monkeypatch):
    environment()
    assert Backend.resolve(automatic(tiny_config)).dtype_name == "bfloat16"
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    backend = Backend.resolve(automatic(tiny_config))
    assert backend.dtype == torch.float32 and not backend.computes_in_software()
    wish = replace(tiny_config, runtime=replace(tiny_config.runtime, dtype="bfloat16"))
    assert Backend.resolve(wish).computes_in_software()


@pytest.mark.parametrize(
    ("name", "value", "fast"),
    [
        ("ONEDNN_MAX_CPU_ISA", "AVX2", False),
        ("ONEDNN_MAX_CPU_ISA", "avx512_core_vnni", False),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16", True),
        ("ONEDNN_MAX_CPU_ISA", "DEFAULT", True),
        ("ATEN_CPU_CAPABILITY", "avx2", False),
        ("ATEN_CPU_CAPABILITY", "default", False),
        ("ATEN_CPU_CAPABILITY", "avx512", True),
    ],
)
def test_instructions_that_are_hidden_do_not_count(new_processor, monkeypatch, name, value, fast):
    assert fast_bfloat16("cpu")
    monkeypatch.setenv(name, value)
    assert fast_bfloat16("cpu") is fast
