"""Peak memory of a training step on this CPU against what the planner predicts, for one process and several layouts.

``python benchmarks/bench_memory.py [--json FILE]`` trains two steps of a small model under every layout, a process for
each rank, and reads from the kernel (Linux) by how much its resident memory grew at the peak. The C library is told to
return every freed block at once, so that what is resident is what is alive; and all is done twice, so that code and
what libraries keep is there already.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megat2i import config
from megat2i.config import Config, ParallelConfig
from megat2i.data.batches import Batch
from megat2i.kernels import choose_ops
from megat2i.loss import ModalityLoss, count_tokens
from megat2i.model.gpt import GPT, Part
from megat2i.optim.torch_engine import TorchEngine
from megat2i.parallel.collectives import TensorParallel
from megat2i.pipeline import Pipeline
from megat2i.planner.cpu_memory import cpu_peak
from megat2i.planner.layout import Job, Layout, rank_stages
from megat2i.runtime import DTYPES
from megat2i.topology import ParallelGroups
from megat2i.vocab import IGNORE

ROOT = Path(__file__).resolve().parent.parent
SHAPE = [
    "model.hidden=256", "model.layers=4", "model.heads=4", "model.ffn=704", "data.sequence_length=128",
    "training.micro_batch_size=8", "training.global_batch_size=32",
]  # fmt: skip
LAYOUTS = (
    ParallelConfig(),
    ParallelConfig(recompute="selective"),
    ParallelConfig(recompute="full"),
    ParallelConfig(tensor=2),
    ParallelConfig(tensor=2, sequence=True),
    ParallelConfig(pipeline=2),
    ParallelConfig(pipeline=2, schedule="interleaved", virtual_stages=2),
    ParallelConfig(pipeline=2, schedule="zero_bubble"),
)


def main() -> None:
    """Measure every layout and print it beside the prediction."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=tuple(DTYPES), nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    settings = config.load(ROOT / "configs/openmoji_demo.yaml", SHAPE)
    rows = []
    print(f"{'layout, rank':52}{'dtype':10}{'predicted':>10}{'measured':>10}{'error':>8}  MB")
    for dtype in arguments.dtype:
        for parallel in LAYOUTS:
            settings = replace(settings, parallel=parallel, runtime=replace(settings.runtime, dtype=dtype))
            for rank, measured in enumerate(measure(settings)):
                rows.append(compared(settings, rank, measured))
                print(line(rows[-1]), flush=True)
    print(f"largest error: {max(abs(row['error']) for row in rows):.1%}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def compared(settings: Config, rank: int, measured: int) -> dict:
    """One row: what was measured on ``rank``, what is predicted, the error of the prediction."""
    layout, job = layout_of(settings), Job.of(settings)
    predicted = cpu_peak(job, layout, settings.runtime.dtype, rank // layout.tensor)
    return {
        "layout": layout.describe(),
        "rank": rank,
        "dtype": settings.runtime.dtype,
        "predicted": round(predicted),
        "measured": measured,
        "error": predicted / measured - 1,
    }


def line(row: dict) -> str:
    name = f"{row['layout']}, rank {row['rank']}"
    predicted, measured = row["predicted"] / 1e6, row["measured"] / 1e6
    return f"{name:52}{row['dtype']:10}{predicted:10.1f}{measured:10.1f}{row['error']:+8.1%}"


def layout_of(settings: Config) -> Layout:
    parallel = settings.parallel
    return Layout(
        parallel.tensor, parallel.pipeline, 1, settings.training.micro_batch_size, parallel.sequence, parallel.schedule,
        parallel.virtual_stages, parallel.recompute,
    )  # fmt: skip


def measure(settings: Config) -> list[int]:
    """Two steps under ``settings``'s layout; bytes at each rank's peak.

    In fresh processes: a forked one would have freed memory of its parent's to use again, without growing.
    """
    context, size = multiprocessing.get_context("spawn"), settings.parallel.tensor * settings.parallel.pipeline
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=run_rank, args=(settings, rank, size, Path(folder))) for rank in range(size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise RuntimeError(f"exit codes {[process.exitcode for process in ranks]}")
        return [int((Path(folder) / f"{rank}.bytes").read_text()) for rank in range(size)]


def run_rank(settings: Config, rank: int, size: int, folder: Path) -> None:
    """One rank: trains and writes its figures."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), size), rank=rank, world_size=size)
    return_freed_memory()
    train(settings)  # loads what is loaded once: code, and what libraries generate and keep for these shapes
    gc.collect()  # hooks on parameters hold the engine, which holds the parameters
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("RssAnon")
    train(settings)
    # Pages of files come and go: the kernel takes back those of a busy machine that were not used for a while.
    files = resident("RssFile") + resident("RssShmem")
    (folder / f"{rank}.bytes").write_text(str(resident("VmHWM") - files - before))
    dist.destroy_process_group()


def train(settings: Config) -> None:
    """Two optimizer steps on random images: moments exist from the first one on."""
    groups, dtype, vocab = (
        ParallelGroups.create(settings.parallel),
        DTYPES[settings.runtime.dtype],
        settings.vocab_layout,
    )
    stages = rank_stages(Job.of(settings), layout_of(settings), groups.pipeline_rank)
    tensor = TensorParallel(groups.tensor, groups.tensor_rank, groups.tensor_size, settings.parallel.sequence)
    part = Part(tensor, stages, settings.parallel.recompute)
    device = torch.device("cpu")
    model = GPT.empty(settings.model, vocab, choose_ops(device, dtype), device, dtype, part)
    model.initialise(0)
    engine = TorchEngine(model, settings.optimizer, settings.training, groups)
    pipeline = Pipeline(model, groups, settings.parallel.schedule)
    batches = [random_batch(settings)] * (settings.training.global_batch_size // settings.training.micro_batch_size)
    for _ in range(2):
        counts = count_tokens([batch.modality for batch in batches])
        pipeline.run_schedule(batches, ModalityLoss((1.0, 1.0, 1.0)), counts, engine.loss_scale)
        engine.step(1e-4)


def random_batch(settings: Config) -> Batch:
    """A micro-batch of random image codes whose every position but the last has a label."""
    vocab, generator = settings.vocab_layout, torch.Generator().manual_seed(0)
    shape = (settings.training.micro_batch_size, settings.data.sequence_length)
    tokens = torch.randint(settings.vocab.image_codes, shape, generator=generator) + vocab.image_start
    labels = torch.cat((tokens[:, 1:], torch.full((shape[0], 1), IGNORE)), dim=1)
    return Batch(tokens, labels, torch.from_numpy(vocab.modality(labels.numpy())), samples=[], text_cut=0)


def return_freed_memory() -> None:
    """Tell glibc's malloc to take large blocks from the kernel and to give every one of them back."""
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    wanted = ((m_mmap_threshold, 64 << 10), (m_trim_threshold, 0))
    if not all(libc.mallopt(option, value) for option, value in wanted):
        raise RuntimeError("this C library does not let its allocator be told to return memory")
    libc.malloc_trim(0)


def resident(key: str) -> int:
    """Bytes of this process in memory: now (RssAnon, RssFile, RssShmem), all of them at the peak (VmHWM)."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
