"""Train a text-to-image model: ``deepspeed pretrain_t2i.py --config configs/X.yaml [section.key=value ...]``.

Also runs under plain ``python`` (one process), ``torchrun`` and ``srun``.
``--resume`` continues the run in ``run.dir``.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

try:
    import megat2i  # noqa: F401 (before torch: it sets how threads wait)
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}")

import numpy as np

from megat2i.checkpoint import CheckpointError
from megat2i.config import Config, ConfigError, load
from megat2i.data.batches import TrainingData, evaluation_batches
from megat2i.data.t2i_dataset import T2IDataset, require_same_tokenizers
from megat2i.data.verification import ReadAt
from megat2i.files import DataFileError
from megat2i.interrupt import leave_on_interrupt, stopped
from megat2i.kernels import choose_ops
from megat2i.loss import ModalityLoss
from megat2i.model import pretrained
from megat2i.model.gpt import GPT
from megat2i.model.part import Part
from megat2i.pretrain import pretrain
from megat2i.printable import ArgumentParser
from megat2i.progress import say
from megat2i.runtime import Backend, is_first_rank, quiet
from megat2i.topology import ParallelGroups
from megat2i.trainer import Data, RunError


def model_provider(config: Config, backend: Backend, part: Part) -> GPT:
    """This rank's part of the model with its initial weights, on the run's device and in its dtype."""
    ops = choose_ops(backend.device, backend.dtype)
    model = GPT.empty(config.model, config.vocab_layout, ops, backend.device, backend.dtype, part)
    if config.model.pretrained:
        pretrained.initialise(model, config)
    else:
        model.initialise(config.model.seed)
    return model


def data_provider(config: Config, backend: Backend, groups: ParallelGroups) -> Data:
    """Micro-batches of every step and the validation batches of this data-parallel rank."""
    data, training = config.data, config.training
    rank = {"dp_rank": groups.data_rank, "dp_size": groups.data_size, "micro_batch_size": training.micro_batch_size}
    dataset = partial(
        T2IDataset, vocab=config.vocab_layout, sequence_length=data.sequence_length, mode=data.mode, seed=data.seed
    )
    sources = [(dataset(d.prefix, caption_dropout=data.caption_dropout), d.weight) for d in data.train]
    train = TrainingData(sources, data.seed, training.global_batch_size)
    held_out = {"valid": dataset(data.valid)} if data.valid else {}
    if data.valid_text:
        held_out["valid_text"] = dataset(data.valid_text, mode="text_only")
    require_same_tokenizers([d for d, _ in sources] + list(held_out.values()))
    rows = {split: min(training.evaluate_samples, len(d)) for split, d in held_out.items()}
    validation = {split: evaluation_batches(d, **rank, rows=rows[split]) for split, d in held_out.items()}

    def touched(first_step: int) -> Iterator[list[ReadAt]]:
        if held_out:
            yield [(d.store, d.byte_offsets(np.arange(rows[split]))) for split, d in held_out.items()]
        yield from (train.byte_offsets(step) for step in range(first_step, training.steps))

    return Data(
        captions={str(d.store.prefix): (len(d), d.cut_captions, d.longest_row) for d, _ in sources},
        micro_batches=lambda step: [batch.to(backend.device) for batch in train.micro_batches(step, **rank)],
        samples=train.samples,
        validation={split: [batch.to(backend.device) for batch in batches] for split, batches in validation.items()},
        stores=[d.store for d in [*held_out.values(), *train.datasets]],
        touched=touched,
    )


def loss_provider(config: Config) -> ModalityLoss:
    """The objective: weights of the modalities and the z-loss."""
    return ModalityLoss((config.loss.text, config.loss.image, config.loss.special), config.loss.z_loss)


def next_steps(config: Config) -> list[str]:
    """What to do with a run that has ended, as lines for the console."""
    run, training = config.run.dir, config.training
    if training.stop_at is not None and training.stop_at < training.steps:
        return ["next: the same command with --resume and a later training.stop_at (null: to the end) continues"]
    if config.data.mode == "text_only":
        return [f"next: python tools/convert_checkpoint.py --from run {run} FOLDER"]
    if not (Path(run) / "tokenizers" / "image").is_dir():
        return []
    prompt = config.sampling.prompts[0] if config.sampling.prompts else "a red apple"
    words = "" if config.data.mode == "image_only" else prompt
    return [
        f"next: python tools/generate.py --run {run} --prompts {shlex.quote(words)}",
        f"      python tools/serve.py --run {run}",
    ]


def main() -> None:
    """Read the command line and train."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument("--resume", action="store_true", help="continue the run in run.dir from its newest checkpoint")
    parser.add_argument("--verbose", action="store_true", help="also show warnings of PyTorch and DeepSpeed")
    parser.add_argument("--local_rank", type=int, help="accepted from launchers and ignored")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="set a field of the configuration")
    arguments = parser.parse_intermixed_args()
    if not arguments.verbose:
        quiet()
    config = load(arguments.config, arguments.overrides)
    first = is_first_rank()
    leave_on_interrupt(partial(stopped, Path(config.run.dir)) if first else None)
    config, request = pretrain(config, arguments.resume, (model_provider, data_provider, loss_provider))
    if request:
        sys.exit(request.exit_code)
    for line in next_steps(config) if first else ():
        say(line)


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, DataFileError, RunError, CheckpointError) as error:
        sys.exit(f"error: {error}")
