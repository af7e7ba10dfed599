"""Times contestants in turn on CPU or GPU, with their peak memory, within a budget of minutes, and records it all.

A row is a dict of figures, or {"skipped": why} for what cannot run here or did not fit the time, or {"error": text} for
what failed. Rows are written to the record as soon as they exist, and ``Record.finish`` exits with 1 where one failed.
"""

import argparse
import ctypes
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "megatron-core",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "flash-attn",
    "flash-attn-4",
)
OUT_OF_TIME = {"skipped": "the minutes were over"}
FEWEST_ROUNDS = 3
GPU_STATE = {  # as nvidia-smi names it: as the record does
    "driver_version": "driver",
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "clocks.max.sm": "sm_max_mhz",
    "power.limit": "power_limit_w",
    "temperature.gpu": "celsius",
}


def parser_for(doc: str, minutes: bool = True) -> argparse.ArgumentParser:
    """A parser with what all benchmarks take, or all that keep to ``minutes``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="the record (default: benchmarks/results/GPU-DATE.json; CPU: none)")
    if minutes:
        parser.add_argument("--minutes", type=float, default=60.0, help="what does not fit is skipped and said")
    return parser


class Record:
    """The record of one benchmark in a file that the benchmarks of a day share, each under its own name."""

    def __init__(self, benchmark: str, file: Path | None, device: torch.device, minutes: float = float("inf")):
        self.benchmark, self.device = benchmark, device
        self.deadline, self.file = time.monotonic() + 60 * minutes, file
        if self.file is None and device.type == "cuda":
            slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
            self.file = RESULTS / f"{slug}-{datetime.date.today()}.json"
        self.entry: dict = {"environment": environment(device), "sections": {}}

    def left(self) -> float:
        """Seconds until the minutes are over."""
        return self.deadline - time.monotonic()

    def add(self, section: str, rows: dict[str, dict]) -> None:
        """Put ``rows`` into ``section``, and everything so far into the file."""
        self.entry["sections"].setdefault(section, {}).update(rows)
        self.entry["gpu"] = gpu_state(self.device)  # while it is still warm
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        content = json.loads(self.file.read_text()) if self.file.exists() else {"device": device_name(self.device)}
        content[self.benchmark] = self.entry
        unfinished = self.file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
        unfinished.replace(self.file)

    def finish(self) -> None:
        """Say where the record is; exits with 1 where a row failed."""
        rows = [(s, name, row) for s, rows in self.entry["sections"].items() for name, row in rows.items()]
        print(f"\n{len(rows)} rows" + (f" in {self.file}" if self.file else ""))
        failed = [f"{section}: {name}: {row['error']}" for section, name, row in rows if "error" in row]
        if failed:
            sys.exit("\n".join(["these failed:", *failed]))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def environment(device: torch.device) -> dict:
    """What the figures depend on, and how they were made."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": versions,
        "git_commit": _output("git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty=+changes"),
        "command": _command(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _command() -> str:
    """This process's, without where the record goes."""
    words = [word for word in sys.argv[1:] if not word.startswith("--json=")]
    if "--json" in words:
        at = words.index("--json")
        del words[at : at + 2]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def gpu_state(device: torch.device) -> dict | None:
    """Driver, clocks, power limit and temperature now, as nvidia-smi says; None without one."""
    if device.type != "cuda":
        return None
    said = _output("nvidia-smi", f"--query-gpu={','.join(GPU_STATE)}", "--format=csv,noheader,nounits")
    values = said.splitlines()[0].split(", ") if said else []
    return dict(zip(GPU_STATE.values(), values, strict=False)) or None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def failure(error: Exception) -> dict:
    """The row of what raised ``error``."""
    return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}


def take_turns(
    contestants: dict[str, Callable | str], rounds: int, device: torch.device, record: Record | None = None
) -> dict[str, dict]:
    """Of every contestant: milliseconds (median, smallest, largest) over ``rounds`` and peak extra memory in MB.

    A text in place of a function says why there is none. ``call.prepare()``, where there is one, runs before every call
    and is not timed. When the minutes of ``record`` are over, whoever has not begun is skipped and the rounds end.
    """
    results, running = {}, {}
    for name, call in contestants.items():
        if isinstance(call, str) or (record and record.left() < 0):
            results[name] = {"skipped": call} if isinstance(call, str) else OUT_OF_TIME
            continue
        try:
            one_time(call, device)  # compiles, warms up
            results[name] = {"peak_mb": _peak(call, device)}
            running[name] = call
        except Exception as error:  # rivals fail in their own ways; the table says how
            results[name] = failure(error)
    times: dict[str, list[float]] = {name: [] for name in running}
    for number in range(rounds):
        if record and record.left() < 0 and number >= FEWEST_ROUNDS:
            break
        for name, call in running.items():
            times[name].append(one_time(call, device))
    for name, values in times.items():
        results[name] |= spread(values)
    return results


def spread(milliseconds: list[float]) -> dict[str, float]:
    """Median, smallest and largest, and of how many."""
    median, least, most = statistics.median(milliseconds), min(milliseconds), max(milliseconds)
    return {"ms": median, "min": least, "max": most, "rounds": len(milliseconds)}


def copy_bandwidth(size: int, rounds: int, device: torch.device) -> float:
    """Gigabytes per second read and written by a copy of ``size`` bytes of random numbers."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    row = take_turns({"copy": lambda: target.copy_(source)}, rounds, device)["copy"]
    return 2 * size / row["ms"] / 1e6


def installed(module: str) -> bool:
    """Whether ``module``, a rival, can be imported here."""
    return importlib.util.find_spec(module) is not None


def one_time(call: Callable, device: torch.device) -> float:
    """Milliseconds of one call, without its ``prepare``."""
    getattr(call, "prepare", lambda: None)()
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
    getattr(call, "prepare", lambda: None)()
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
    """Print a table, and put into every row its ``ratio`` to the time of contestant ``base`` (where that ran)."""
    print(f"\n{title}\n{'':36}{'ms':>9}{'min':>9}{'max':>9}{'x time':>8}{'MB':>9}")
    against = results[base].get("ms")
    for name, row in results.items():
        if "ms" not in row:
            print(f"{name:36}{row.get('error') or row['skipped']}")
            continue
        row["ratio"] = row["ms"] / against if against else None
        ratio = f"{row['ratio']:8.2f}" if against else f"{'-':>8}"
        print(f"{name:36}{row['ms']:9.2f}{row['min']:9.2f}{row['max']:9.2f}{ratio}{row['peak_mb']:9.0f}{extra(row)}")
