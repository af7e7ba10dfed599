"""A language model's weights on disk, whatever wrote them: read tensor by tensor under the global names of ``GPT``.

Our own form is a folder of safetensors files beside ``megat2i_model.json``, which says the model's shape.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megat2i.config import ModelConfig
from megat2i.files import DataFileError, pending_folder
from megat2i.kernels import choose_ops
from megat2i.model.gpt import GPT
from megat2i.vocab import VocabLayout
from megat2i.weights_file import Spec, WeightFiles, write_weights

MODEL_FILE, FORMAT = "megat2i_model.json", 1
TOKENIZER = "tokenizer.json"  # as a Hugging Face folder has it
TABLES = ("tok_embeddings.weight", "output.weight")
# fields of ModelConfig that say how a run begins, not what the model is
BEGINNING = ("seed", "pretrained", "expansion", "expansion_file")


@dataclass(frozen=True)
class ModelWeights:
    """``read`` gives the whole tensor of a name on the CPU; ``dtypes`` of all names.

    ``rows`` of the vocabulary tables follow ``vocab``; None: they are a plain language model's, all of them text.
    """

    path: Path
    shape: ModelConfig
    rows: int
    dtypes: dict[str, torch.dtype]
    read: Callable[[str], Tensor]
    vocab: VocabLayout | None = None

    def specs(self) -> dict[str, Spec]:
        """Shape and dtype of every tensor."""
        return {name: Spec(size, self.dtypes[name]) for name, size in sizes(self.shape, self.rows).items()}


def sizes(shape: ModelConfig, rows: int) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters of a model with ``rows`` vocabulary rows, by name."""
    with torch.device("meta"):
        model = GPT(shape, rows, ((0, rows),), choose_ops(torch.device("cpu"), torch.float32))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def require_sizes(path: Path, found: dict[str, Spec], expected: dict[str, tuple[int, ...]]) -> None:
    """Raises DataFileError where ``found`` are not exactly the floating-point tensors ``expected``."""
    shapes = {name: spec.shape for name, spec in found.items()}
    wrong = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
    if wrong:
        expected_shape, shape = (None if s is None else list(s) for s in (expected.get(wrong[0]), shapes.get(wrong[0])))
        raise DataFileError(
            path,
            f"does not hold this model: {len(wrong)} tensors differ, first '{wrong[0]}': "
            f"expected shape {expected_shape}, found {shape}",
            "Give the parameters that belong to the file",
        )
    for name, spec in found.items():
        if not spec.dtype.is_floating_point:
            raise DataFileError(path, f"{name} holds {spec.dtype}, not floating-point weights", "Dequantise the model")


def is_own(folder: Path) -> bool:
    """Whether ``folder`` is of our own form."""
    return (folder / MODEL_FILE).is_file()


def save(weights: ModelWeights, folder: Path, source: dict, tokenizer: Path | None = None) -> None:
    """Write ``folder`` in our own form, with a copy of the ``tokenizer``; one tensor in memory at a time.

    ``source``: where the weights are from.
    """
    model = {name: value for name, value in dataclasses.asdict(weights.shape).items() if name not in BEGINNING}
    vocab = None if weights.vocab is None else dataclasses.asdict(weights.vocab)
    content = {"format": FORMAT, "rows": weights.rows, "vocab": vocab, "model": model, "source": source}
    with pending_folder(folder) as pending:
        write_weights(pending, weights.specs(), weights.read)
        (pending / MODEL_FILE).write_text(json.dumps(content, indent=1) + "\n")
        if tokenizer:
            shutil.copyfile(tokenizer, pending / TOKENIZER)


def load(folder: Path) -> ModelWeights:
    """Open a folder of our own form. Raises DataFileError."""
    try:
        content = json.loads((folder / MODEL_FILE).read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, this version reads {FORMAT}")
        shape, rows = ModelConfig(**content["model"]), int(content["rows"])
        vocab = None if content["vocab"] is None else VocabLayout(**content["vocab"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"not readable as the description of a model ({error!r})"
        raise DataFileError(folder / MODEL_FILE, problem, "Make it again with tools/convert_checkpoint.py") from error
    files = WeightFiles(folder)
    require_sizes(folder, files.specs, sizes(shape, rows))
    return ModelWeights(folder, shape, rows, {n: s.dtype for n, s in files.specs.items()}, files.read, vocab)


@torch.no_grad()
def fill(model: GPT, read: Callable[[str], Tensor]) -> None:
    """Copy this rank's part of every tensor into ``model``, one whole tensor in memory at a time."""
    shards = model.shards()
    for name, parameter in model.named_parameters():
        parameter.copy_(shards[name].cut(read(name)))
