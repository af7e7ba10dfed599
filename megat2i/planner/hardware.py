"""The machines that the planner knows: data sheets, and the fraction of them that software reaches.

Sizes in bytes, speeds in bytes or FLOPs a second, one direction. A node has eight GPUs on NVSwitch and one network card
for each GPU; the nodes' network does not block.
"""

from dataclasses import dataclass

NODE = 8  # GPUs of a node

# Fractions of a data sheet's figure that software reaches.
MEMORY_FRACTION = 0.85  # of the memory's bandwidth, by elementwise kernels and around matrix products
NVLINK_FRACTION = 0.775  # of one direction, by NCCL's all-reduce: 232.5 of 300 GB/s (NVIDIA/nccl issue 1048, 8 x A100)
NETWORK_FRACTION = 0.85  # of the cards, by NCCL's all-reduce: 84.8 of 100 GB/s (NVIDIA/nccl-tests issue 119, A100)


@dataclass(frozen=True)
class Gpu:
    """One GPU and its links. ``matmul`` and ``attention``: the fractions of ``peak`` that large matrix products and
    fused causal attention reach."""

    name: str
    peak: float  # dense bfloat16 FLOP/s
    memory: float  # bytes, nominal: driver and ECC take what is above it
    bandwidth: float  # of its memory, bytes/s
    nvlink: float  # bytes/s, one direction
    network: float  # bytes/s of its network card, one direction
    matmul: float
    attention: float


# Data sheets: NVIDIA A100 (2021), H100 SXM (2023), H200 SXM (2023). Network: DGX A100 has 8 x 200 Gbit/s, DGX H100 and
# DGX H200 8 x 400 Gbit/s. matmul: fitted to training runs, see published.py; the H200's is the H100's, whose chip it
# has. attention: FlashAttention-2 (Dao 2023, arXiv 2307.08691), forward and backward, causal, head width 128, sequences
# of 1k to 2k.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40", 312e12, 40e9, 1.555e12, 300e9, 25e9, matmul=0.795, attention=0.42),
        Gpu("a100-80", 312e12, 80e9, 2.039e12, 300e9, 25e9, matmul=0.795, attention=0.42),
        Gpu("h100-80", 989e12, 80e9, 3.35e12, 450e9, 50e9, matmul=0.585, attention=0.35),
        Gpu("h200-141", 989e12, 141e9, 4.8e12, 450e9, 50e9, matmul=0.585, attention=0.35),
    )
}


def ring_bandwidth(gpu: Gpu, ranks: int, stride: int) -> float:
    """Bytes a second through each rank in a collective over ``ranks`` ranks that are ``stride`` ranks apart.

    Within a node NVLink bounds it. Across nodes all ``NODE`` cards work, shared by the groups that communicate at the
    same time: a group with g ranks on a node has g cards.
    """
    if ranks * stride <= NODE:
        return gpu.nvlink * NVLINK_FRACTION
    on_a_node = max(1, NODE // stride)
    return min(gpu.nvlink * NVLINK_FRACTION, on_a_node * gpu.network * NETWORK_FRACTION)


def matmul_seconds(gpu: Gpu, rows: float, inner: float, columns: float) -> float:
    """One bfloat16 product [rows, inner] x [inner, columns]: its FLOPs, and its operands and result once through the
    memory. The two are added: the first and the last tiles of a kernel overlap with nothing, and the sum reproduces how
    slim products fall short."""
    flops = 2 * rows * inner * columns
    traffic = 2 * (rows * inner + inner * columns + rows * columns)
    return flops / (gpu.peak * gpu.matmul) + traffic / (gpu.bandwidth * MEMORY_FRACTION)


def memory_seconds(gpu: Gpu, traffic: float) -> float:
    """``traffic`` bytes read and written by elementwise kernels."""
    return traffic / (gpu.bandwidth * MEMORY_FRACTION)
