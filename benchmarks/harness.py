"""Times contestants in turn on CPU or GPU, with their peak memory, and prints and saves the figures."""

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "flash-attn", "flash-attn-4")


def environment(device: torch.device) -> dict:
    """What the figures depend on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    load = os.getloadavg()[0]
    return {"device": name, "threads": torch.get_num_threads(), "load": load, "versions": versions}


def take_turns(contestants: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, dict]:
    """Of every contestant: milliseconds (median, smallest, largest) over ``rounds`` and peak extra memory in MB.

    A contestant that raises has its error instead of figures, so that one of them does not end the run.
    """
    results, running = {}, {}
    for name, call in contestants.items():
        try:
            call()  # compiles, warms up
            results[name] = {"peak_mb": _peak(call, device)}
            running[name] = call
        except Exception as error:  # rivals fail in their own ways; the table says how
            results[name] = {
                "error": f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
            }
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, call in running.items():
            times[name].append(one_time(call, device))
    for name, values in times.items():
        results[name] |= {"ms": statistics.median(values), "min": min(values), "max": max(values)}
    return results


def installed(module: str) -> bool:
    """Whether ``module``, a rival, can be imported here."""
    return importlib.util.find_spec(module) is not None


def one_time(call: Callable, device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end)
    started = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - started)


def _peak(call: Callable, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # what is freed but kept for later would hide the peak
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak that VmHWM holds
    before = _status("VmRSS")
    call()
    return max(0.0, (_status("VmHWM") - before) / 1e3)


def _status(field: str) -> float:
    """A field of this process's status in kilobytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(field)))


def report(title: str, results: dict[str, dict], base: str, extra: Callable[[dict], str] = lambda row: "") -> None:
    """Print a table with ratios to contestant ``base``."""
    print(f"\n{title}\n{'':36}{'ms':>9}{'min':>9}{'max':>9}{'x time':>8}{'MB':>9}{'x MB':>7}")
    against = results[base]
    for name, row in results.items():
        if "error" in row:
            print(f"{name:36}{row['error']}")
            continue
        ratio, memory = row["ms"] / against["ms"], row["peak_mb"] / max(against["peak_mb"], 1e-9)
        figures = f"{row['ms']:9.2f}{row['min']:9.2f}{row['max']:9.2f}{ratio:8.2f}{row['peak_mb']:9.0f}{memory:7.2f}"
        print(f"{name:36}{figures}{extra(row)}")


def save(file: Path | None, device: torch.device, sections: dict) -> None:
    """Write everything as JSON."""
    if file is not None:
        file.write_text(json.dumps({"environment": environment(device), **sections}, indent=1) + "\n")
