"""Where a run executes: device, communication backend, dtype and rank, resolved once and started once.

What is asked for explicitly and is missing raises; nothing falls back without saying so.
"""

import atexit
import ctypes
import os
import platform
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megat2i.config import Config, ConfigError
from megat2i.progress_marks import mark

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


# Settings of the libraries that multiply on x86, with the values that leave no bfloat16 instructions to them.
WITHOUT_BFLOAT16 = {
    "ONEDNN_MAX_CPU_ISA": ("sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni"),
    "ATEN_CPU_CAPABILITY": ("default", "avx2"),
}


def fast_bfloat16(device: str = "auto") -> bool:
    """Whether bfloat16 is multiplied in hardware: by a GPU, or by a CPU with AVX512-BF16 or AMX that may use them.

    ``device`` as ``runtime.device``. Elsewhere bfloat16 is computed in software, many times slower than float32.
    """
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    for name, values in WITHOUT_BFLOAT16.items():
        if os.environ.get(name, "").lower() in values:
            return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@dataclass(frozen=True)
class Backend:
    """What this process runs on. ``launcher``: deepspeed | torchrun | slurm | none (a single process)."""

    device: torch.device
    dtype: torch.dtype
    communication: str  # nccl | gloo
    engine: str  # deepspeed | torch
    launcher: str
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int

    @staticmethod
    def resolve(config: Config) -> "Backend":
        """Read the launcher's environment and the machine; raises ConfigError for what is asked for but missing."""
        launcher, rank, local_rank, world_size, local_world_size = _launched_as()
        wanted = config.runtime.device
        if wanted == "cuda" and not torch.cuda.is_available():
            raise ConfigError("runtime.device=cuda, but this PyTorch sees no CUDA device; use runtime.device=cpu")
        cuda = wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())
        device_index = 0 if torch.cuda.device_count() == 1 else local_rank  # 1: the launcher shows each rank its own
        if cuda and device_index >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {rank} is number {local_rank} here, where there are {torch.cuda.device_count()} CUDA devices: "
                "start as many processes as devices"
            )
        dtype = config.runtime.dtype
        if dtype == "auto":
            dtype = "bfloat16" if fast_bfloat16("cuda" if cuda else "cpu") else "float32"
        return Backend(
            device=torch.device("cuda", device_index) if cuda else torch.device("cpu"),
            dtype=DTYPES[dtype],
            communication="nccl" if cuda else "gloo",
            engine=config.optimizer.engine or ("deepspeed" if launcher == "deepspeed" else "torch"),
            launcher=launcher,
            rank=rank,
            local_rank=local_rank,
            world_size=world_size,
            local_world_size=local_world_size,
        )

    def start(self, seed: int) -> None:
        """Seed PyTorch, share out the processor cores and join the process group."""
        torch.manual_seed(seed)
        if "OMP_NUM_THREADS" not in os.environ:  # else every rank would start a thread per core
            cores = len(os.sched_getaffinity(0))  # what a container or a batch system leaves to this process
            torch.set_num_threads(max(1, cores // self.local_world_size))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            # Subnormal numbers are many times slower on CPUs, and GPUs flush them too.
            torch.set_flush_denormal(True)
            _keep_freed_memory()
        mark("joining the other ranks")
        if self.launcher == "none":
            dist.init_process_group(self.communication, store=dist.HashStore(), rank=0, world_size=1)
            atexit.register(_leave_group)
        else:
            self._join_group()
            dist.barrier()  # no rank writes to the run folder before all have checked it

    @property
    def place(self) -> tuple[int, int, int]:
        """Rank, rank on this machine, and number of ranks."""
        return self.rank, self.local_rank, self.world_size

    @property
    def dtype_name(self) -> str:
        """The dtype as ``runtime.dtype`` has it."""
        return str(self.dtype).removeprefix("torch.")

    def computes_in_software(self) -> bool:
        """Whether the dtype is one that the device has no instructions for."""
        return self.dtype == torch.bfloat16 and not fast_bfloat16(self.device.type)

    def _join_group(self) -> None:
        try:
            dist.init_process_group(
                self.communication, rank=self.rank, world_size=self.world_size, timeout=COLLECTIVE_TIMEOUT
            )
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise ConfigError(
                f"port {os.environ.get('MASTER_PORT')} is in use, perhaps by another run on this machine: choose "
                "another one (deepspeed and torchrun: --master_port, srun: MASTER_PORT)"
            ) from error

    def describe(self) -> str:
        """One line for the log and for ``environment.json``."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else processor_name()
        return (
            f"device={self.device.type} ({name}) dtype={self.dtype_name} "
            f"communication={self.communication} engine={self.engine} launcher={self.launcher} "
            f"ranks={self.world_size} threads={torch.get_num_threads()}"
        )


def processor_name() -> str:
    """The processor's name; its architecture where the system does not tell the name, as on arm64."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _leave_group() -> None:
    """Else gloo's threads now and then abort the exit of a refused run: it has no other rank to wait for."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _keep_freed_memory() -> None:
    """Tell glibc's malloc to reuse large blocks instead of returning them to the kernel after every operation.

    Each return costs page faults on the next allocation: a quarter of the demo's training step. Other C libraries have
    no ``mallopt`` and are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if platform.libc_ver()[0] == "glibc" and mallopt is not None:
        m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)
        mallopt(m_top_pad, 256 << 20)


def is_first_rank() -> bool:
    """Whether this process speaks for the launch; raises ConfigError as ``Backend.resolve`` does."""
    return _launched_as()[1] == 0


def quiet() -> None:
    """Keep what concerns the libraries' authors off the console: deprecations, and how DeepSpeed looks for devices."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as it finds out itself, with a warning


def _launched_as() -> tuple[str, int, int, int, int]:
    """(launcher, rank, local rank, world size, ranks on this machine) from the launcher's environment variables."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        # DeepSpeed's launcher names the number of local ranks LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE.
        launcher = "deepspeed" if "LOCAL_SIZE" in env else "torchrun"
        local_world_size = env.get("LOCAL_SIZE") or env.get("LOCAL_WORLD_SIZE") or "1"
        rank, local_rank, world_size = (_number(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        return launcher, rank, local_rank, world_size, int(local_world_size)
    if "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:  # a step: started by srun, not by sbatch
        if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
            raise ConfigError(
                "started by srun without MASTER_ADDR and MASTER_PORT: export them in the job script, for example "
                "MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1) MASTER_PORT=29500"
            )
        tasks_here = int(env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_NTASKS_PER_NODE", "1")).split("(")[0])
        rank, local_rank, world_size = (_number(f"SLURM_{name}") for name in ("PROCID", "LOCALID", "NTASKS"))
        return "slurm", rank, local_rank, world_size, tasks_here
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if int(env.get(name, "1")) > 1:
            raise ConfigError(
                f"started by MPI ({name}={env[name]}), which sets no RANK: use deepspeed, torchrun or srun"
            )
    return "none", 0, 0, 1, 1


def _number(name: str) -> int:
    value = os.environ.get(name)
    if value is None or not value.isdigit():
        raise ConfigError(f"the launcher's environment variable {name} is {value!r}, expected a number")
    return int(value)
