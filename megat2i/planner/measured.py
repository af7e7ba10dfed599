"""The planner beside a record of the benchmarks (benchmarks/results): coefficients measured on the GPU itself.

The head's benchmark gives the speed of matrix products, the block's the bandwidth that elementwise kernels reach. The
step's is held out: its predicted time is shown beside the measured one. Attention keeps the figure of hardware.py.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from megat2i.config import Config
from megat2i.files import DataFileError
from megat2i.planner.hardware import MEMORY_FRACTION, Gpu, memory_seconds
from megat2i.planner.layout import Job, Layout
from megat2i.planner.speed import step_time
from megat2i.planner.system import ours

PRODUCTS = "three matrix products (G)"


@dataclass(frozen=True)
class Measured:
    """``sections`` by benchmark, as benchmarks/harness.py writes them: {title: {contestant: row}}."""

    device: str
    sections: dict[str, dict[str, dict[str, dict]]]

    @staticmethod
    def read(path: Path) -> "Measured":
        """Raises DataFileError where ``path`` is no record."""
        try:
            record = json.loads(path.read_text())
            sections = {name: entry["sections"] for name, entry in record.items() if name != "device"}
            return Measured(record["device"], sections)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"is no record of the benchmarks: {type(error).__name__} {error}"
            raise DataFileError(path, problem, "Name a JSON file that a benchmark wrote") from error

    def rows(self, benchmark: str, contestant: str) -> list[dict]:
        """The figures of ``contestant`` in every section where it has some."""
        sections = self.sections.get(benchmark, {}).values()
        return [rows[contestant] for rows in sections if "ms" in rows.get(contestant, {})]

    def calibrated(self, gpu: Gpu) -> Gpu:
        """``gpu`` with what was measured in place of its bandwidth and of ``matmul``; the rest as it is."""
        copies = self.sections.get("block", {}).get("copy", {}).values()
        reached = [row["of_copy"] for row in self.rows("block", "ours")]
        if reached:
            copied = 1e9 * mean(row["gb_per_s"] for row in copies)
            gpu = replace(gpu, bandwidth=copied * mean(reached) / MEMORY_FRACTION)
        fractions = []
        for row in self.rows("head", PRODUCTS):  # the inverse of hardware.matmul_seconds
            tokens, width, columns = row["sizes"]
            traffic = 2 * (tokens * width + width * columns + tokens * columns)
            seconds = row["ms"] / 3000 - memory_seconds(gpu, traffic)
            fractions.append(2 * tokens * width * columns / seconds / gpu.peak)
        return replace(gpu, matmul=mean(fractions)) if fractions else gpu

    def report(self, settings: Config, gpu: Gpu) -> str:
        """The coefficients, and every step of ours that was measured beside its prediction, error last."""
        lines = [f"measured on {self.device}: bandwidth {gpu.bandwidth * MEMORY_FRACTION / 1e12:.2f} TB/s, "
                 f"matrix products {gpu.peak * gpu.matmul / 1e12:.0f} TFLOP/s",
                 f"{'step, one GPU, seconds':56}{'measured':>10}{'predicted':>10}{'error':>8}"]  # fmt: skip
        for title, rows in self.sections.get("step", {}).items():
            for name, row in rows.items():
                if "ms" in row and row["ours"]:
                    job = replace(Job.of(settings), global_batch=row["micro_batch"])
                    layout = Layout(1, 1, 1, row["micro_batch"], recompute=row["recompute"])
                    predicted = step_time(job, layout, ours(job.shape, 1), gpu).seconds
                    found = row["ms"] / 1000
                    lines.append(f"{f'{title}, {name}':56}{found:10.3f}{predicted:10.3f}{predicted / found - 1:+8.1%}")
        return "\n".join(lines) + "\n"
