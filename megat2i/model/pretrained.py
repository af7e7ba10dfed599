"""How a run starts from a pre-trained language model: ``model.pretrained`` names its folder, in our form or a
Hugging Face one, and ``model.expansion`` how special tokens and image codes get their rows.

``require_fit`` tells before any work whether the folder, the configuration and the data belong together.
"""

import dataclasses
from pathlib import Path

from torch import Tensor

from megat2i.config import Config, ConfigError, ModelConfig
from megat2i.data.manifest import Manifest
from megat2i.files import DataFileError
from megat2i.model import expand, huggingface, weights
from megat2i.model.gpt import GPT
from megat2i.model.weights import BEGINNING, TABLES, TOKENIZER, ModelWeights
from megat2i.tokenizers.text import JsonTokenizer, load_text_tokenizer
from megat2i.weights_file import file_sha256

PROBE = "A red apple on the table, 12 steps away from Zoë's café."


def open_pretrained(folder: str | Path) -> ModelWeights:
    """Weights in a folder that tools/convert_checkpoint.py wrote or in a Hugging Face one; raises DataFileError."""
    folder = Path(folder)
    if weights.is_own(folder):
        return weights.load(folder)
    if huggingface.is_folder(folder):
        return huggingface.load(folder)
    raise DataFileError(
        folder,
        f"neither a folder of tools/convert_checkpoint.py ({weights.MODEL_FILE}) nor a Hugging Face model "
        f"({huggingface.CONFIG})",
        "Convert an open_lm file first: python tools/convert_checkpoint.py --from open_lm FILE FOLDER",
    )


def require_fit(settings: Config) -> None:
    """Raises ConfigError or DataFileError where the run cannot start from ``model.pretrained``; reads no weights."""
    model, vocab = settings.model, settings.vocab_layout
    source = open_pretrained(model.pretrained)
    differences = shape_differences(model, source.shape)
    if differences:
        raise ConfigError(f"model.pretrained={model.pretrained} is another model; set {' '.join(differences)}")
    if source.vocab is not None:
        if source.vocab != vocab:
            raise ConfigError(
                f"model.pretrained={model.pretrained} has the vocabulary {source.vocab}, the data has {vocab}"
            )
        if model.expansion == "file":
            raise ConfigError(
                f"model.pretrained={model.pretrained} has image rows already, and model.expansion_file="
                f"{model.expansion_file} would not be used: leave model.expansion and model.expansion_file out"
            )
        return
    expand.require_fit(source.path, source.rows, vocab)
    if model.expansion == "file":
        tables = [name for name in TABLES if name in source.dtypes]
        expand.require_file(model.expansion_file, tables, vocab, model.hidden)
    _require_tokenizer(settings, source.path / TOKENIZER)


def initialise(model: GPT, settings: Config) -> None:
    """Fill this rank's part of ``model``; one whole tensor is in memory at a time."""
    shape, vocab = settings.model, settings.vocab_layout
    source = open_pretrained(shape.pretrained)

    def read(name: str) -> Tensor:
        tensor = source.read(name)
        if source.vocab is not None or name not in TABLES:
            return tensor
        return expand.expand(name, tensor, vocab, shape.expansion, shape.seed, shape.expansion_file)

    weights.fill(model, read)


def digests(folder: str | Path) -> dict[str, str]:
    """SHA-256 of every weight file in the folder, by name."""
    return {path.name: file_sha256(path) for path in sorted(Path(folder).glob("*.safetensors"))}


def shape_differences(model: ModelConfig, other: ModelConfig) -> list[str]:
    """Fields of ``model`` that make it another model than ``other``, as ``model.field=the other's value``."""
    return [
        f"model.{field.name}={_effective(other, field.name)}"
        for field in dataclasses.fields(ModelConfig)
        if field.name not in BEGINNING and _effective(model, field.name) != _effective(other, field.name)
    ]


def _effective(shape: ModelConfig, field: str):
    """The value of a field, with what a None stands for."""
    if field == "rotary_base" and shape.positions == "none":
        return None
    names = {"kv_heads": "key_value_heads", "head_width": "head_dim", "ffn": "ffn_hidden"}
    return getattr(shape, names.get(field, field))


def _require_tokenizer(settings: Config, path: Path) -> None:
    """Raises DataFileError where the folder's own tokenizer is not the one that the data was made with."""
    prefix = settings.data.train[0].prefix
    manifest = Manifest.read(prefix)
    if not path.is_file() or manifest is None or manifest.text is None:
        return
    own, data = JsonTokenizer(path), load_text_tokenizer(Path(prefix).parent / manifest.text.tokenizer)
    if own.encode([PROBE]) != data.encode([PROBE]):
        raise DataFileError(
            path, f"encodes text otherwise than {data.path}, which made the data", "Tokenise the data with this one"
        )
