"""Tokens per second of our training step against a plain Hugging Face loop of the same size, in one run.

``python benchmarks/bench_training.py [--json FILE]`` trains the demo's model shape on random rows: ours (the torch
engine and ``train_step``) and ``transformers.LlamaForCausalLM`` with the same width, depth, heads, feed-forward width
and vocabulary, AdamW, gradient clipping and the loss over the same tokens, in the same dtype. The two take turns, so
that a change of the machine's speed hits both. Llama has rotary positions, RMSNorm and computes the logits of all rows.
"""

import dataclasses
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from harness import Record, parser_for
from transformers import LlamaConfig, LlamaForCausalLM

from megat2i import config
from megat2i.data.batches import Batch
from megat2i.kernels import choose_ops
from megat2i.loss import ModalityLoss
from megat2i.model.gpt import GPT
from megat2i.optim.torch_engine import TorchEngine
from megat2i.pipeline import Pipeline
from megat2i.runtime import DTYPES, Backend
from megat2i.topology import ParallelGroups
from megat2i.trainer import train_step
from megat2i.vocab import IGNORE

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Time the two in turn and print medians, spread and the ratio."""
    parser = parser_for(__doc__, minutes=False)
    parser.add_argument("--config", default=str(ROOT / "configs/openmoji_demo.yaml"))
    parser.add_argument("--dtype", choices=tuple(DTYPES), nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="steps in a round")
    arguments = parser.parse_args()
    settings = config.load(arguments.config)
    record = None
    for dtype in arguments.dtype:
        settings = dataclasses.replace(settings, runtime=dataclasses.replace(settings.runtime, dtype=dtype))
        backend = Backend.resolve(settings)
        if not dist.is_initialized():
            backend.start(seed=0)
        batch = random_batch(settings).to(backend.device)
        contestants = {
            "ours": our_step(settings, backend, batch),
            "transformers": hugging_face_step(settings, backend, batch),
        }
        speeds = take_turns(contestants, arguments.rounds, arguments.steps, int((batch.modality >= 0).sum()))
        ratios = [a / b for a, b in zip(speeds["ours"], speeds["transformers"], strict=True)]
        row, record = {}, record or Record("training", arguments.json, backend.device)
        for name, values in (*speeds.items(), ("ratio", ratios)):
            row[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
            unit = "" if name == "ratio" else " tokens/s"
            print(f"{dtype:9} {name:13} {row[name]['median']:9.2f}{unit} ({min(values):.2f} to {max(values):.2f})")
        record.add(f"tokens per second, {dtype}", row)
    record.finish()


def random_batch(settings: config.Config) -> Batch:
    """A global batch of random image ids whose every position but the last has a label."""
    layout, generator = settings.vocab_layout, torch.Generator().manual_seed(0)
    shape = (settings.training.global_batch_size, settings.data.sequence_length)
    tokens = torch.randint(settings.vocab.image_codes, shape, generator=generator) + layout.image_start
    labels = torch.cat((tokens[:, 1:], torch.full((shape[0], 1), IGNORE)), dim=1)
    return Batch(tokens, labels, torch.from_numpy(layout.modality(labels.numpy())), samples=[], text_cut=0)


def our_step(settings: config.Config, backend: Backend, batch: Batch):
    """A function that makes one of our optimizer steps."""
    groups = ParallelGroups.create(settings.parallel)
    ops = choose_ops(backend.device, backend.dtype)
    model = GPT.empty(settings.model, settings.vocab_layout, ops, backend.device, backend.dtype)
    model.initialise(seed=0)
    engine = TorchEngine(model, settings.optimizer, settings.training, groups)
    loss = ModalityLoss((1.0, 1.0, 1.0))
    pipeline = Pipeline(model, groups)
    return lambda: train_step(pipeline, engine, [batch], loss, groups, lr=1e-4)


def hugging_face_step(settings: config.Config, backend: Backend, batch: Batch):
    """A function that makes one step of a plain loop around transformers' Llama."""
    shape = settings.model
    llama = LlamaConfig(
        vocab_size=settings.vocab_layout.size,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn_hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = LlamaForCausalLM(llama).to(backend.device, backend.dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        logits = model(batch.tokens).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def take_turns(contestants: dict, rounds: int, steps: int, tokens: int) -> dict[str, list[float]]:
    """Tokens per second of every contestant in every round."""
    for step in contestants.values():
        step()  # warm-up
    speeds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, step in contestants.items():
            started = time.perf_counter()
            for _ in range(steps):
                step()
            speeds[name].append(steps * tokens / (time.perf_counter() - started))
    return speeds


if __name__ == "__main__":
    main()
