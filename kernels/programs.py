"""How many programs share the rows of a kernel that also sums over rows."""

import torch


def program_count(rows: int, device: torch.device) -> int:
    """Eight a multiprocessor on a GPU, few where the kernel is interpreted; the same at every call, so sums repeat."""
    most = 8 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return max(1, min(rows, most))
