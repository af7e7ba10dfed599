"""Published training speeds, and what the planner predicts for them.

One constant for each kind of GPU is fitted, ``matmul``: the A100's on two points, the H100's on one. All other points
are held out of the fit; what each system computes and sends was written down with all of them in view. A figure is
brought to tokens a second and GPU by its publisher's own formula.
"""

from dataclasses import dataclass, replace

from megat2i.config import ModelConfig
from megat2i.planner.hardware import GPUS
from megat2i.planner.layout import Job, Layout
from megat2i.planner.speed import step_time
from megat2i.planner.system import Head, Passes, System

GELU = 8 / 3  # a GELU layer of width 4 x hidden multiplies as much as SwiGLU of this width
MATERIALISED_LOGITS = Head(logit_bytes=34)  # 17 passes, counted in bfloat16

# llm-foundry: norms, residuals and GELU as PyTorch's own kernels, FSDP overlapped, FlashAttention in its first version,
# which is half as fast as the second (arXiv 2307.08691)
LLM_FOUNDRY = System(
    forward=Passes(10, 0, 2 * 4 / GELU), backward=Passes(16, 6, 3 * 4 / GELU),
    scores=(0, 0), flash=0.5, head=MATERIALISED_LOGITS, hidden_reductions=False,
    gradient=2, weights=4, overlap=True, accumulate=8, update=34,
)  # fmt: skip
# lit-gpt: FlashAttention-2, fused norms, SwiGLU and loss
LIT_GPT = System(
    forward=Passes(6, 0, 3), backward=Passes(9, 6, 5),
    scores=(0, 0), flash=1, head=Head(logit_bytes=10), hidden_reductions=False,
    gradient=2, weights=4, overlap=True, accumulate=8, update=34,
)  # fmt: skip
# Megatron-LM in 2021: attention scores kept, softmax with mask and scale fused, bias fused with GELU and with dropout
# and residual. A score is written, read and written by softmax and by dropout with its mask, and read by the product:
# 13 bytes forward, and 19 backward.
MEGATRON = System(
    forward=Passes(11, 0, 2 * 4 / GELU), backward=Passes(17, 6, 3 * 4 / GELU),
    scores=(13, 19), flash=1, head=MATERIALISED_LOGITS, hidden_reductions=False,
    gradient=2, weights=0, overlap=False, accumulate=10, update=34,
)  # fmt: skip
# In 2022: reductions beside weight gradients, and these added to the float32 sum by the product itself, which reads and
# writes it instead of bfloat16
MEGATRON_2022 = replace(MEGATRON, accumulate=6, hidden_reductions=True)


@dataclass(frozen=True)
class Point:
    """``tokens``: tokens a second and GPU, as published or derived by ``formula``'s inverse."""

    name: str
    gpu: str
    job: Job
    layout: Layout
    system: System
    tokens: float
    source: str
    fitted: bool = False

    def predicted(self) -> float:
        """Tokens a second and GPU by the planner."""
        seconds = step_time(self.job, self.layout, self.system, GPUS[self.gpu]).seconds
        return self.job.tokens / seconds / self.layout.gpus

    def error(self) -> float:
        return self.predicted() / self.tokens - 1


def _mpt(size: str, gpu: str, gpus: int, length: int, micro_batch: int, accumulate: int, tokens: float, fitted=False):
    """A row of llm-foundry's table without activation checkpointing."""
    hidden, layers, heads = {
        "125M": (768, 12, 12),
        "350M": (1024, 24, 16),
        "760M": (1536, 24, 12),
        "1B": (2048, 24, 16),
        "3B": (2560, 32, 20),
        "7B": (4096, 32, 32),
        "13B": (5120, 40, 40),
    }[size]
    shape = ModelConfig(hidden=hidden, layers=layers, heads=heads, ffn=round(GELU * hidden))
    job = Job(shape, 50_368, 50_368, length, micro_batch * accumulate * gpus)
    name = f"MPT-{size}, {length:,}, {gpus} x {gpu}"
    source = "mosaicml/llm-foundry, scripts/train/benchmarking/README.md"
    return Point(name, gpu, job, Layout(1, 1, gpus, micro_batch), LLM_FOUNDRY, tokens, source, fitted)


def _megatron_2021(billions: str, hidden: int, layers: int, heads: int, layout: Layout, batch: int, teraflops: float):
    """A row of table 1 of Narayanan et al. 2021 (arXiv 2104.04473), which counts recomputation; its micro-batch is not
    stated."""
    job = Job(
        ModelConfig(hidden=hidden, layers=layers, heads=heads, ffn=round(GELU * hidden)), 51_200, 51_200, 2048, batch
    )
    flops = 96 * job.tokens * layers * hidden**2 * (1 + 2048 / (6 * hidden) + 51_200 / (16 * layers * hidden))
    tokens = teraflops * 1e12 * job.tokens / flops
    return Point(
        f"Megatron {billions}, recompute full", "a100-80", job, layout, MEGATRON, tokens, "arXiv 2104.04473, table 1"
    )


def _megatron_2022(billions: str, hidden: int, layers: int, heads: int, layout: Layout, batch: int, mfu: float):
    """A row of table 5 of Korthikanti et al. 2022 (arXiv 2205.05198): its MFU counts all keys of attention."""
    job = Job(
        ModelConfig(hidden=hidden, layers=layers, heads=heads, ffn=round(GELU * hidden)), 51_200, 51_200, 2048, batch
    )
    flops = 72 * job.tokens * layers * hidden**2 * (1 + 2048 / (6 * hidden) + 51_200 / (12 * layers * hidden))
    tokens = mfu * 312e12 * job.tokens / flops
    return Point(
        f"Megatron {billions}, selective, sequence",
        "a100-80",
        job,
        layout,
        MEGATRON_2022,
        tokens,
        "arXiv 2205.05198, table 5",
    )


def _tiny_llama() -> Point:
    # 4 of 32 heads have keys and values: this ffn gives a layer's matrices the same size
    shape = ModelConfig(hidden=2048, layers=22, heads=32, ffn=4437, norm="rms_norm")
    job = Job(shape, 32_000, 32_000, 2048, 1024)
    return Point(
        "TinyLlama-1.1B, 16 x a100-40", "a100-40", job, Layout(1, 1, 16, 8), LIT_GPT, 24_000, "TinyLlama README"
    )


POINTS = (
    _mpt("1B", "a100-80", 8, 2048, 14, 4, 20_513, fitted=True),
    _mpt("7B", "a100-80", 8, 2048, 6, 2, 4_641, fitted=True),
    _mpt("1B", "a100-80", 8, 1024, 18, 4, 22_112),
    _mpt("1B", "a100-80", 8, 4096, 7, 4, 17_807),
    _mpt("3B", "a100-80", 8, 2048, 10, 2, 10_811),
    _mpt("13B", "a100-80", 8, 2048, 2, 3, 2_262),
    _mpt("125M", "a100-40", 64, 2048, 26, 1, 125_234),
    _mpt("350M", "a100-40", 64, 2048, 18, 1, 52_689),
    _mpt("760M", "a100-40", 64, 2048, 12, 1, 29_344),
    _mpt("1B", "a100-40", 64, 2048, 10, 1, 19_001),
    _mpt("3B", "a100-40", 64, 2048, 6, 1, 9_736),
    _tiny_llama(),
    _megatron_2021("1.7B, 1.1.32", 2304, 24, 24, Layout(1, 1, 32, 4, recompute="full"), 512, 137),
    _megatron_2021("3.6B, 1.2.32", 3072, 30, 32, Layout(2, 1, 32, 4, recompute="full"), 512, 138),
    _megatron_2021("7.5B, 1.4.32", 4096, 36, 32, Layout(4, 1, 32, 4, recompute="full"), 512, 142),
    _megatron_2021("18.4B, 1.8.32", 6144, 40, 48, Layout(8, 1, 32, 4, recompute="full"), 1024, 135),
    _megatron_2022("22B, 1.8.1", 6144, 48, 64, Layout(8, 1, 1, 4, True, recompute="selective"), 4, 0.415),
    _megatron_2022("175B, 8.8.1", 12288, 96, 96, Layout(8, 8, 1, 1, True, "interleaved", 3, "selective"), 64, 0.514),
    _megatron_2022(
        "530B, 35.8.1", 20480, 105, 128, Layout(8, 35, 1, 1, True, "interleaved", 3, "selective"), 280, 0.560
    ),
    _megatron_2022("1T, 64.8.1", 25600, 128, 160, Layout(8, 64, 1, 1, True, recompute="selective"), 512, 0.563),
    _mpt("7B", "h100-80", 8, 2048, 6, 1, 10_643, fitted=True),
    _mpt("1B", "h100-80", 64, 2048, 20, 1, 44_402),
    _mpt("3B", "h100-80", 64, 2048, 6, 3, 22_525),
)
