"""Script: starts many real ranks on this machine and trains a narrow model under the layouts of configuration files.

    python many_ranks.py RANKS CONFIG.yaml ...

Prints one JSON object: for every file the losses and gradient norms of the steps, the same of one process, seconds, and
the memory of all ranks together. The ranks are forked from a process that has imported PyTorch and run nothing: a fork
after work on several threads can hang.
"""

import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
import torch
import torch.distributed as dist

from megat2i import config
from megat2i.config import Config, DataConfig, ModelConfig, ParallelConfig, RuntimeConfig, TrainingConfig, VocabConfig
from megat2i.data.batches import Batch
from megat2i.kernels import choose_ops
from megat2i.loss import ModalityLoss
from megat2i.model.gpt import GPT
from megat2i.model.part import part_of
from megat2i.optim.torch_engine import TorchEngine
from megat2i.pipeline import Pipeline
from megat2i.topology import ParallelGroups
from megat2i.trainer import train_step
from megat2i.vocab import IGNORE

STEPS, ROWS = 2, 64


def narrow(parallel: ParallelConfig, layers: int) -> Config:
    """``parallel`` around a model that takes no time: the layout, the schedule and the number of ranks are real."""
    rows = ROWS * parallel.tensor * parallel.pipeline // dist.get_world_size()  # of one data-parallel rank
    micro_batch = max(1, rows // parallel.pipeline)
    return Config(
        vocab=VocabConfig(text_tokens=505, image_codes=250),
        data=DataConfig(sequence_length=16),
        model=ModelConfig(hidden=64, layers=layers, heads=8, ffn=64, qk_norm=True, positions="rotary"),
        training=TrainingConfig(global_batch_size=ROWS, micro_batch_size=micro_batch),
        parallel=parallel,
        runtime=RuntimeConfig(device="cpu", dtype="float32"),
    )


def batches(settings: Config, step: int, rank: int, ranks: int) -> list[Batch]:
    """One rank's micro-batches; the share of image tokens and of ignored labels differs from row to row."""
    layout, training = settings.vocab_layout, settings.training
    generator = torch.Generator().manual_seed(step)
    shape = (training.global_batch_size, settings.data.sequence_length)
    tokens = torch.randint(0, layout.text_tokens, shape, generator=generator)
    image = torch.rand(shape, generator=generator) < torch.linspace(0, 1, shape[0])[:, None]
    tokens[image] = layout.image_start + tokens[image] % layout.image_codes
    labels = tokens.roll(-1, dims=1)
    for row in range(shape[0]):
        labels[row, shape[1] - 1 - row % 9 :] = IGNORE
    modality = torch.from_numpy(layout.modality(labels.numpy()))
    share, size = shape[0] // ranks, training.micro_batch_size
    rows = [slice(n, n + size) for n in range(rank * share, (rank + 1) * share, size)]
    return [Batch(tokens[r], labels[r], modality[r], [], 0) for r in rows]


def train(settings: Config) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    groups = ParallelGroups.create(settings.parallel)
    device = torch.device("cpu")
    ops = choose_ops(device, torch.float32)
    part = part_of(settings, groups)
    model = GPT.empty(settings.model, settings.vocab_layout, ops, device, torch.float32, part)
    model.initialise(0)
    engine = TorchEngine(model, settings.optimizer, settings.training, groups)
    pipeline, loss, results = Pipeline(model, groups, settings.parallel.schedule), ModalityLoss((1.0, 1.0, 1.0)), []
    for step in range(STEPS):
        mine = batches(settings, step, groups.data_rank, groups.data_size)
        metrics, norm = train_step(pipeline, engine, mine, loss, groups, lr=1e-2)
        results.append((metrics.as_dict()["loss"], norm))
    return results


def rank_main(rank: int, ranks: int, store: str, layouts: list[ParallelConfig], layers: int, writer) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    results = []
    for parallel in layouts:
        started = time.monotonic()
        steps = train(narrow(parallel, layers))
        results.append({"steps": steps, "seconds": time.monotonic() - started})
    memory = [line for line in Path("/proc/self/smaps_rollup").read_text().splitlines() if line.startswith("Pss:")]
    writer.send_bytes(json.dumps({"layouts": results, "pss_kb": int(memory[0].split()[1])}).encode())
    dist.barrier()
    dist.destroy_process_group()


def launch(ranks: int, layouts: list[ParallelConfig], layers: int) -> list[dict]:
    """What every rank reports."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
        processes = [
            context.Process(target=rank_main, args=(rank, ranks, f"{folder}/store", layouts, layers, pipes[rank][1]))
            for rank in range(ranks)
        ]
        for process, (_, writer) in zip(processes, pipes, strict=True):
            process.start()
            writer.close()
        try:
            return [json.loads(reader.recv_bytes()) for reader, _ in pipes]  # EOFError where a rank died
        finally:
            for process in processes:
                process.join(timeout=10)
                process.kill()


def main() -> None:
    ranks, files = int(sys.argv[1]), sys.argv[2:]
    layouts = [config.load(file).parallel for file in files]
    started = time.monotonic()
    layers = max(layout.pipeline * layout.virtual_stages for layout in layouts)  # a layer for every stage
    (alone,) = launch(1, [ParallelConfig()], layers)
    reports = launch(ranks, layouts, layers)
    results = {
        Path(file).stem: {
            "steps": [report["layouts"][number]["steps"] for report in reports],
            "seconds": max(report["layouts"][number]["seconds"] for report in reports),
        }
        for number, file in enumerate(files)
    }
    memory = sum(report["pss_kb"] for report in reports) / 2**20
    seconds = time.monotonic() - started
    print(json.dumps({"alone": alone["layouts"][0]["steps"], "layouts": results, "gb": memory, "seconds": seconds}))


if __name__ == "__main__":
    main()
