"""Where the time of a training step goes, by part of the model, from one profiled step."""

import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

PARTS = ("head", "attention", "products", "elementwise", "optimizer", "rest")
ATTENTION = ("scaled_dot_product", "flash_attn", "flash_attention", "cudnn_attention")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul")
BACKWARD = "autograd::engine::evaluate_function"


def parts_of_step(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Milliseconds by part of one call of ``step``, which marks its ranges "head", "attention" and "optimizer".

    An operation belongs to the first of these that it, or what called it, is: "optimizer" (with the sums of gradients),
    "head", "attention" (their backward passes are found by autograd's sequence numbers; attention also by the names of
    its operations, where a compiled block has no ranges), a matrix product of the blocks; what is left of the model is
    "elementwise" (norms, activations, residuals, embedding). On a GPU the time is that of its kernels and "rest" the
    time in which none ran; on a CPU it is its own time and "rest" the time between operations.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        started = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize(device)
        whole = 1000 * (time.perf_counter() - started)
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CPU]
    made_in = {
        name: {
            (e.thread, e.sequence_nr)
            for e in events
            if e.sequence_nr >= 0 and _called_by(e, lambda p, name=name: p.name == name)
        }
        for name in ("head", "attention")
    }
    parts = dict.fromkeys(PARTS, 0.0)
    for event in events:
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        parts[_part(event, made_in)] += microseconds / 1000
    parts["rest"] = max(0.0, whole - sum(parts.values()))
    return parts


def _called_by(event, test: Callable) -> bool:
    """Whether ``test`` holds for the event or for one that it is within."""
    while event is not None:
        if test(event):
            return True
        event = event.cpu_parent
    return False


def _part(event, made_in: dict[str, set]) -> str:
    def within(name: str, words: tuple[str, ...]) -> bool:
        return _called_by(
            event,
            lambda e: (
                e.name == name
                or any(word in e.name for word in words)
                or (e.name.startswith(BACKWARD) and (e.fwd_thread, e.sequence_nr) in made_in[name])
            ),
        )

    if _called_by(event, lambda e: e.name == "optimizer" or "AccumulateGrad" in e.name):
        return "optimizer"
    if within("head", ("linear_cross_entropy",)):
        return "head"
    if within("attention", ATTENTION):
        return "attention"
    return "products" if _called_by(event, lambda e: e.name in PRODUCTS) else "elementwise"
