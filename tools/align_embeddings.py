"""Align embeddings of image codes with a language model's text embeddings, and look at what that gives:

  python tools/align_embeddings.py --config configs/paper/alignment.yaml [--resume] [section.key=value ...]

Trains in ``run.dir`` (curves: ``metrics.jsonl``, with ``temperature``), then a control on shuffled captions in
``run.dir``/control. Writes ``image_embeddings.safetensors``, the ``model.expansion_file`` of a run that starts from it,
and ``nearest_tokens.json``: the nearest text tokens of image codes, how many of them are words, and how many held-out
pairs find each other, beside the control. A process joins the others once, so with several ranks (``torchrun``, srun)
every launch trains one of the two: launch again with ``--resume`` for the control.
"""

import argparse
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path

import megat2i  # noqa: F401 (before torch: it sets how threads wait)

# isort: split
import safetensors.torch
import torch

from megat2i import run_folder
from megat2i.checkpoint import CheckpointError
from megat2i.config import Config, ConfigError, load
from megat2i.data.manifest import Manifest
from megat2i.data.sizes import with_data_sizes
from megat2i.experiments import nearest_tokens
from megat2i.experiments.alignment import TABLE, Providers, initial_rows, require
from megat2i.files import DataFileError, write_file
from megat2i.interrupt import leave_on_interrupt, stopped
from megat2i.model.pretrained import open_pretrained
from megat2i.pretrain import pretrain
from megat2i.printable import ArgumentParser
from megat2i.runtime import Backend, is_first_rank
from megat2i.tokenizers.text import load_text_tokenizer
from megat2i.trainer import RunError

EMBEDDINGS = "image_embeddings.safetensors"


def align(settings: Config, resume: bool) -> None:
    """Train what is not finished, then compare; collective over all ranks of the launch."""
    settings = with_data_sizes(settings)
    backend = Backend.resolve(settings)
    require(settings, backend.world_size)
    folders = {"aligned": Path(settings.run.dir), "shuffled": Path(settings.run.dir) / "control"}
    for name, folder in folders.items():
        own = dataclasses.replace(settings, run=dataclasses.replace(settings.run, dir=str(folder)))
        if resume and (folder / EMBEDDINGS).exists():
            run_folder.check(folder, own, resume)
            continue
        providers = Providers(own, shuffled=name == "shuffled")
        resumed = resume and (folder / run_folder.CONFIG).exists()
        _, request = pretrain(own, resumed, (providers.make_model, providers.make_data, providers.make_loss))
        if request:
            sys.exit(request.exit_code)
        if backend.rank == 0:
            rows = as_long_as(initial_rows(own), providers.model.tok_embeddings.weight.detach().cpu())
            write_file(folder / EMBEDDINGS, safetensors.torch.save({TABLE: rows}))
            print(f"{folder / EMBEDDINGS} is written")
        if backend.world_size > 1 and name == "aligned":
            return
    if backend.rank == 0:
        write_report(settings, folders)


def as_long_as(initial: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``rows`` [codes, D] at the lengths they began with: the loss sees directions alone, a model sees lengths too."""
    return torch.nn.functional.normalize(rows, dim=1) * initial.norm(dim=1, keepdim=True)


def write_report(settings: Config, folders: dict[str, Path]) -> None:
    """nearest_tokens.json in the first of the finished runs ``folders``."""
    prefix, tokens = settings.data.train[0].prefix, settings.vocab_layout.text_tokens
    tables = {name: safetensors.torch.load_file(folder / EMBEDDINGS)[TABLE] for name, folder in folders.items()}
    text = open_pretrained(settings.model.pretrained).read(TABLE)[:tokens].float()
    tokenizer = load_text_tokenizer(Path(prefix).parent / Manifest.read(prefix).text.tokenizer)
    result = nearest_tokens.report(tables | {"random": initial_rows(settings)}, text, tokenizer, settings)
    result["retrieval"] = nearest_tokens.retrieval(folders, settings.training.global_batch_size)
    content = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    write_file(folders["aligned"] / "nearest_tokens.json", content.encode())
    for part in ("word_like", "retrieval"):
        for name, test in result[part]["tests"].items():
            print(f"{part}, {name}: {test['statement']}")


def main() -> None:
    """Read the command line and align."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file, see configs/")
    parser.add_argument("--resume", action="store_true", help="continue what is in run.dir")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="set a field of the configuration")
    arguments = parser.parse_intermixed_args()
    settings = load(arguments.config, arguments.overrides)
    leave_on_interrupt(partial(stopped, Path(settings.run.dir)) if is_first_rank() else None)
    align(settings, arguments.resume)


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, DataFileError, RunError, CheckpointError) as error:
        sys.exit(f"error: {error}")
