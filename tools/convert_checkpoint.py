"""Convert a model's weights, one tensor in memory at a time:

  python tools/convert_checkpoint.py --from open_lm open_lm_1b.pt pretrained/open_lm_1b
  python tools/convert_checkpoint.py --from run runs/mine exported/mine --to huggingface
  python tools/convert_checkpoint.py --from run runs/mine runs/more --to run --config configs/more.yaml

The first makes a folder for ``model.pretrained`` of a run and prints the section ``model`` that goes with it (a Hugging
Face folder needs no conversion). So does ``--from run`` alone; of a run with ``data.mode=text_only`` it keeps the rows
of text ids only, as of any language model. The second makes one that transformers, vLLM and lm-eval open; it holds
``megat2i_vocab.json``, which says how ids of the run became ids of the export. The third makes a run that ``--resume``
continues with more image codes: they get rows by ``model.expansion``, and 0 as their optimizer state. Nothing in a file
is executed.
"""

import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path

import megat2i  # noqa: F401 (before torch: it sets how threads wait)

# isort: split
import torch
from omegaconf import OmegaConf

from megat2i import checkpoint, config, run_folder
from megat2i.checkpoint import CheckpointError
from megat2i.config import Config, ConfigError, ModelConfig
from megat2i.data.sizes import with_data_sizes
from megat2i.files import DataFileError, pending_folder, read_json_object
from megat2i.interrupt import said_on_interrupt
from megat2i.model import expand, huggingface, open_lm, weights
from megat2i.model.pretrained import open_pretrained, shape_differences
from megat2i.model.weights import TABLES, ModelWeights
from megat2i.optim.engine import WEIGHT
from megat2i.printable import ArgumentParser
from megat2i.runtime import DTYPES
from megat2i.tokenizers import export
from megat2i.trainer import RunError
from megat2i.weights_file import file_sha256


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, metavar="INPUT", help="a file of open_lm, a folder, or a run's folder")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the folder to make")
    parser.add_argument(
        "--from", dest="source", required=True, choices=("open_lm", "pretrained", "run"),
        help="open_lm: a .pt file; pretrained: a folder that model.pretrained takes; run: its newest checkpoint",
    )  # fmt: skip
    parser.add_argument("--to", dest="target", choices=("megat2i", "huggingface", "run"), default="megat2i")
    parser.add_argument("--config", type=Path, help="with --to run: the configuration of the run to come")
    parser.add_argument(
        "--params", type=Path, help="open_lm's parameters or model_config as JSON (default: those of the released 1B)"
    )
    parser.add_argument(
        "--sequence-length", type=int, metavar="S",
        help="positions that an exported model is for (default: those of the run; 2,048 without one)",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of a Hugging Face folder")
    arguments = parser.parse_args()
    if arguments.params and arguments.source != "open_lm":
        parser.error("--params goes with --from open_lm")
    extending = arguments.target == "run"
    if extending != (arguments.config is not None) or (extending and arguments.source != "run"):
        parser.error("--to run goes with --from run and --config")
    return arguments


def main() -> None:
    """Open the one form, write the other."""
    arguments = parse_arguments()
    if arguments.target == "run":
        extend_run(arguments.input, arguments.output, arguments.config)
        return
    run = None
    if arguments.source == "open_lm":
        source = open_lm.open_weights(arguments.input, read_params(arguments.params))
    elif arguments.source == "pretrained":
        source = open_pretrained(arguments.input)
    else:
        source, run = open_run(arguments.input)
    if arguments.target == "megat2i":
        text_only = run is not None and run.data.mode == "text_only"
        source = language_model(source) if text_only else source
        origin = {"from": arguments.source, "name": arguments.input.name}
        if arguments.input.is_file():
            origin["sha256"] = file_sha256(arguments.input)
        tokenizers = (arguments.input / "tokenizers" / "text").glob("*.json") if text_only else ()
        weights.save(source, arguments.output, origin, next(iter(tokenizers), None))  # a run from here needs the same
        print(f"{arguments.output}: start a run from it with this section of its configuration:\n")
        print(model_section(source.shape, arguments.output), end="")
        return
    length = arguments.sequence_length or (run.data.sequence_length if run else 2048)
    with pending_folder(arguments.output) as pending:
        huggingface.save(source, pending, length, DTYPES[arguments.dtype])
        if run:
            for tokenizer in (arguments.input / "tokenizers" / "text").glob("*"):  # none where the data names none
                print(export.save(tokenizer, source.vocab, length, pending))
    print(f"{arguments.output}: transformers.AutoModelForCausalLM.from_pretrained opens it")


def read_params(path: Path | None) -> dict | None:
    """open_lm's dictionary of parameters from a JSON file."""
    if path is None:
        return None
    return read_json_object(path, "Pass a model_config of open_lm")


def open_run(folder: Path) -> tuple[ModelWeights, Config]:
    """The weights of the newest sound checkpoint of a run, and the run's configuration."""
    settings = config.load(folder / "config.yaml")
    found, vocab = newest(folder), settings.vocab_layout
    dtypes = dict.fromkeys(checkpoint.weight_shapes(found), torch.float32)
    read = partial(checkpoint.read_tensor, found)
    return ModelWeights(folder, settings.model, vocab.size, dtypes, read, vocab), settings


def language_model(source: ModelWeights) -> ModelWeights:
    """A model that was trained on text alone without its rows of special tokens and image codes, which mean nothing."""
    rows = source.vocab.text_tokens

    def read(name: str) -> torch.Tensor:
        return source.read(name)[: rows if name in TABLES else None]

    return dataclasses.replace(source, rows=rows, read=read, vocab=None)


def extend_run(folder: Path, output: Path, path: Path) -> None:
    """Make the run folder ``output`` for the configuration ``path``: the checkpoint of ``folder`` with more codes."""
    before = config.load(folder / "config.yaml")
    after = with_data_sizes(config.load(path, [f"run.dir={output}"]))
    if after.runtime.dtype == "auto":
        after = dataclasses.replace(after, runtime=before.runtime)
    old, new = before.vocab_layout, after.vocab_layout
    differences = shape_differences(after.model, before.model)
    if differences:
        raise ConfigError(f"{path}: describes another model than {folder}; set {', '.join(differences)}")
    if old.text_tokens != new.text_tokens or old.image_codes > new.image_codes:
        raise ConfigError(f"{path}: the vocabulary can only get more image codes: {folder} has {old}, now {new}")
    model = after.model
    if model.expansion == "file":
        tables = TABLES[:1] if model.tied_embeddings else TABLES
        expand.require_file(model.expansion_file, list(tables), new, model.hidden)

    def change(name: str, kind: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in TABLES:
            return tensor
        rule = model.expansion if kind == WEIGHT else None
        return expand.extend(name, tensor, old, new, rule, model.seed, model.expansion_file)

    found = newest(folder)
    with pending_folder(output) as pending:
        checkpoint.write_changed(found, pending / "checkpoints", change)
        run_folder.write(pending, after, before.optimizer.engine, {"extended_from": str(found.path)})
    print(f"{output}: continue it with pretrain_t2i.py --config {path} run.dir={output} --resume")


def newest(folder: Path) -> checkpoint.Checkpoint:
    """The newest sound checkpoint of a run; raises ConfigError where there is none."""
    found = checkpoint.latest_here(folder / "checkpoints")
    if found is None:
        raise ConfigError(f"{folder}/checkpoints: no sound checkpoint; train the run to its first checkpoint")
    return found


def model_section(shape: ModelConfig, folder: Path) -> str:
    """The section ``model`` of a run that starts from ``folder``, as YAML."""
    fields = dataclasses.asdict(dataclasses.replace(shape, pretrained=str(folder)))
    return OmegaConf.to_yaml({"model": fields})


if __name__ == "__main__":
    try:
        with said_on_interrupt("interrupted; nothing was written"):
            main()
    except (ConfigError, DataFileError, CheckpointError, RunError) as error:
        sys.exit(f"error: {error}")
