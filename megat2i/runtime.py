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

from megat2i import rendezvous
from megat2i.config import Config, ConfigError
from megat2i.launch import Launch
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
    """What this process runs on, and how it was started."""

    device: torch.device
    dtype: torch.dtype
    communication: str  # nccl | gloo
    engine: str  # deepspeed | torch
    launch: Launch

    @staticmethod
    def resolve(config: Config) -> "Backend":
        """Read the launcher's environment and the machine; raises ConfigError for what is asked for but missing."""
        launch = Launch.here(config.run.dir)
        wanted = config.runtime.device
        if wanted == "cuda" and not torch.cuda.is_available():
            raise ConfigError("runtime.device=cuda, but this PyTorch sees no CUDA device; use runtime.device=cpu")
        cuda = wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())
        devices = torch.cuda.device_count()
        device_index = 0 if devices == 1 else launch.local_rank  # 1: the launcher shows each rank its own
        if cuda and device_index >= devices:
            raise ConfigError(
                f"rank {launch.rank} is number {launch.local_rank} here, where there are {devices} CUDA devices: "
                "start as many processes as devices"
            )
        dtype = config.runtime.dtype
        if dtype == "auto":
            dtype = "bfloat16" if fast_bfloat16("cuda" if cuda else "cpu") else "float32"
        return Backend(
            device=torch.device("cuda", device_index) if cuda else torch.device("cpu"),
            dtype=DTYPES[dtype],
            communication="nccl" if cuda else "gloo",
            engine=config.optimizer.engine or ("deepspeed" if launch.launcher == "deepspeed" else "torch"),
            launch=launch,
        )

    def start(self, seed: int) -> None:
        """Seed PyTorch, share out the processor cores and join the process group."""
        torch.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        else:
            # Subnormal numbers are many times slower on CPUs, and GPUs flush them too.
            torch.set_flush_denormal(True)
            _keep_freed_memory()
        mark("joining the other ranks")
        store, threads = (dist.HashStore(), _cores()) if self.launch.alone else rendezvous.meet(self.launch)
        if "OMP_NUM_THREADS" not in os.environ:  # else every rank would start a thread per core
            torch.set_num_threads(threads)
        dist.init_process_group(
            self.communication, store=store, rank=self.rank, world_size=self.world_size, timeout=COLLECTIVE_TIMEOUT
        )
        if self.launch.alone:
            atexit.register(_leave_group)
        else:
            dist.barrier()  # no rank writes to the run folder before all have checked it

    @property
    def launcher(self) -> str:
        return self.launch.launcher

    @property
    def rank(self) -> int:
        return self.launch.rank

    @property
    def local_rank(self) -> int:
        return self.launch.local_rank

    @property
    def world_size(self) -> int:
        return self.launch.world_size

    @property
    def dtype_name(self) -> str:
        """The dtype as ``runtime.dtype`` has it."""
        return str(self.dtype).removeprefix("torch.")

    def computes_in_software(self) -> bool:
        """Whether the dtype is one that the device has no instructions for."""
        return self.dtype == torch.bfloat16 and not fast_bfloat16(self.device.type)

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
    return Launch.here().rank == 0


def quiet() -> None:
    """Keep what concerns the libraries' authors off the console: deprecations, and how DeepSpeed looks for devices."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as it finds out itself, with a warning


def _cores() -> int:
    """What a container or a batch system leaves to this process."""
    return len(os.sched_getaffinity(0))
