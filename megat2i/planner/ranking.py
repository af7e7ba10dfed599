"""The plan: every sensible layout with its memory, time and speed, the best first."""

from dataclasses import asdict, dataclass

from megat2i.model import cost
from megat2i.planner.hardware import Gpu
from megat2i.planner.layout import Job, Layout, candidates
from megat2i.planner.memory import Memory, memory
from megat2i.planner.speed import StepTime, step_time
from megat2i.planner.system import ours

GOAL = 100e9  # tokens whose hours are predicted: the paper's run
GB = 1e9


@dataclass(frozen=True)
class Planned:
    """One layout. Tokens are positions of rows, padding included; MFU counts the causal half of attention."""

    job: Job
    layout: Layout
    gpu: Gpu
    memory: Memory
    time: StepTime

    @property
    def fits(self) -> bool:
        return self.memory.fits(self.gpu)

    @property
    def tokens_per_s(self) -> float:
        return self.job.tokens / self.time.seconds

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.tokens_per_s / self.layout.gpus

    @property
    def mfu(self) -> float:
        flops = cost.flops_per_token(self.job.shape, self.job.columns, self.job.sequence_length)
        return self.tokens_per_s_per_gpu * flops / self.gpu.peak

    @property
    def hours(self) -> float:
        """For ``GOAL`` tokens."""
        return GOAL / self.tokens_per_s / 3600

    @property
    def shares(self) -> dict[str, float]:
        """Share of the step by kind of work."""
        time = self.time
        kinds = dict(asdict(time.work)) | {
            name: getattr(time, name) for name in ("recompute", "bubble", "pipeline", "data", "optimizer")
        }
        return {name: seconds / time.seconds for name, seconds in kinds.items()}

    def as_dict(self) -> dict:
        """Everything, in GB, seconds and shares of the step."""
        return asdict(self.layout) | {
            "fits": self.fits,
            "memory_gb": round(self.memory.total / GB, 3),
            "memory_parts_gb": {name: round(value / GB, 3) for name, value in asdict(self.memory).items()},
            "tokens_per_s_per_gpu": round(self.tokens_per_s_per_gpu, 1),
            "tokens_per_s": round(self.tokens_per_s, 1),
            "mfu": round(self.mfu, 4),
            "step_s": round(self.time.seconds, 4),
            "hours_for_100b_tokens": round(self.hours, 2),
            "share_of_step": {name: round(share, 4) for name, share in self.shares.items()},
            "sent_gb_per_step": {name: round(value / GB, 3) for name, value in asdict(self.time.links).items()},
        }


def plan(job: Job, gpus: int, gpu: Gpu) -> list[Planned]:
    """Every candidate: those that fit by speed, then the others by memory; raises ValueError where there is none."""
    planned = [
        Planned(job, layout, gpu, memory(job, layout), step_time(job, layout, ours(job.shape, layout.tensor), gpu))
        for layout in candidates(job, gpus)
    ]
    if not planned:
        raise ValueError(
            f"no layout: a batch of {job.global_batch} sequences does not divide over {gpus} GPUs in any way; "
            "change training.global_batch_size or --gpus"
        )
    fitting = sorted((p for p in planned if p.fits), key=lambda p: -p.tokens_per_s)
    return fitting + sorted((p for p in planned if not p.fits), key=lambda p: p.memory.total)
