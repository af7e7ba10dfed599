"""Hugging Face folders of LlamaForCausalLM and Qwen3ForCausalLM: opened as our weights, and written from them.

A model of the unified vocabulary is exported without its unused rows: ids move together, and ``megat2i_vocab.json``
says how, so that opening such a folder again restores the layout.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megat2i.config import ConfigError, ModelConfig
from megat2i.files import DataFileError, read_json_object
from megat2i.model.weights import TABLES, ModelWeights, require_sizes, sizes
from megat2i.vocab import VocabLayout
from megat2i.weights_file import Spec, WeightFiles, write_weights

CONFIG, GENERATION, VOCAB = "config.json", "generation_config.json", "megat2i_vocab.json"
FORMAT = 1
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
REMEDY = "Only plain Llama and Qwen3 models can be opened"

# our names and those that Hugging Face has for the same rows, one after another
ENDS = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {
    "attention_norm.weight": ("input_layernorm.weight",),
    "attention.in_proj.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attention.q_norm.weight": ("self_attn.q_norm.weight",),
    "attention.k_norm.weight": ("self_attn.k_norm.weight",),
    "attention.out_proj.weight": ("self_attn.o_proj.weight",),
    "ffn_norm.weight": ("post_attention_layernorm.weight",),
    "feed_forward.w12.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "feed_forward.w3.weight": ("mlp.down_proj.weight",),
}


def is_folder(folder: Path) -> bool:
    """Whether ``folder`` looks like a Hugging Face model."""
    return (folder / CONFIG).is_file()


def load(folder: Path) -> ModelWeights:
    """Open a folder of safetensors. Raises DataFileError, and ConfigError for a model that ours cannot be."""
    settings = read_json_object(folder / CONFIG, "Restore the original file")
    try:
        shape, rows = model_shape(settings, folder), int(settings["vocab_size"])
    except KeyError as error:
        raise DataFileError(folder / CONFIG, f"lacks {error.args[0]}", "Restore the original file") from error
    files = WeightFiles(folder)
    found = {name: spec for name, spec in files.specs.items() if not name.endswith("inv_freq")}
    if shape.tied_embeddings:
        found.pop(ENDS["output.weight"], None)  # a copy: transformers reads the embedding in its place
    expected = _their_sizes(shape, rows)
    require_sizes(folder, found, expected)
    vocab = None
    if (folder / VOCAB).is_file():
        vocab = _read_vocab(folder / VOCAB, rows)

    def read(name: str) -> Tensor:
        parts = [files.read(part) for part in their_names(name)]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        return _spread(tensor, vocab) if vocab and name in TABLES else tensor

    own_rows = vocab.size if vocab else rows
    names = sizes(shape, own_rows)
    dtypes = {name: found[their_names(name)[0]].dtype for name in names}
    return ModelWeights(folder, shape, own_rows, dtypes, read, vocab)


def save(weights: ModelWeights, folder: Path, sequence_length: int, dtype: torch.dtype) -> None:
    """Fill the empty ``folder`` with weights, ``config.json`` and what else transformers reads, but for a tokenizer.

    ``sequence_length``: positions that the model was trained on. One tensor is in memory at a time.
    """
    vocab = weights.vocab
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # unknown of a plain language model
    rows = weights.rows
    if vocab:
        rows = sum(stop - start for start, stop in vocab.ranges)
        names = {"bos_token_id": "<doc>", "eos_token_id": "</doc>", "pad_token_id": "<pad>"}
        special = {key: exported_id(vocab, vocab.special(name)) for key, name in names.items()}
    settings = _settings(weights.shape, rows, sequence_length) | special | {"dtype": str(dtype).removeprefix("torch.")}
    # transformers before 5 knows the dtype under the first name alone
    _write_json(folder / CONFIG, settings | {"torch_dtype": settings["dtype"]})
    _write_json(folder / GENERATION, special | {"do_sample": True, "max_length": sequence_length})
    if vocab:
        _write_json(folder / VOCAB, _vocab_content(vocab))
    specs = {name: Spec(size, dtype) for name, size in _their_sizes(weights.shape, rows).items()}
    write_weights(folder, specs, _their_reader(weights))


def exported_id(vocab: VocabLayout, unified: int) -> int:
    """The id in an exported model of a unified id that is in use."""
    start = 0
    for low, high in vocab.ranges:
        if low <= unified < high:
            return start + unified - low
        start += high - low
    raise ValueError(f"id {unified} is in no range of the vocabulary and is not exported")


def their_names(name: str) -> tuple[str, ...]:
    """Hugging Face's names of the tensors that, one after another, are our ``name``."""
    if name in ENDS:
        return (ENDS[name],)
    _, number, rest = name.split(".", 2)
    return tuple(f"model.layers.{number}.{part}" for part in LAYER[rest])


def model_shape(settings: dict, folder: Path) -> ModelConfig:
    """Our description of a ``config.json``; raises ConfigError for what ours cannot express."""
    kind = settings.get("model_type")
    if kind not in ARCHITECTURES:
        raise ConfigError(f"{folder / CONFIG}: model_type is '{kind}'. {REMEDY}")
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    layers, heads, hidden = (settings[k] for k in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    sliding = "sliding_attention" in (settings.get("layer_types") or ()) or settings.get("use_sliding_window")
    unsupported = {
        "attention_bias": settings.get("attention_bias"),
        "mlp_bias": settings.get("mlp_bias"),
        "hidden_act": settings.get("hidden_act", "silu") != "silu",
        "rope_parameters (rope_scaling)": (rope.get("rope_type") or rope.get("type") or "default") != "default",
        "partial_rotary_factor": (rope | settings).get("partial_rotary_factor", 1.0) != 1.0,
        "use_sliding_window": sliding,
        "quantization_config": settings.get("quantization_config"),
    }
    for key, present in unsupported.items():
        if present:
            value = settings.get(key, rope)
            raise ConfigError(f"{folder / CONFIG}: {key} is {value}, which is not supported. {REMEDY}")
    width = settings.get("head_dim") or (128 if kind == "qwen3" else hidden // heads)
    return ModelConfig(
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=settings.get("num_key_value_heads") or heads,
        head_width=width,
        ffn=settings["intermediate_size"],
        norm="rms_norm",
        norm_eps=settings.get("rms_norm_eps", 1e-6),
        qk_norm=kind == "qwen3",
        qk_norm_per_head=kind == "qwen3",
        tied_embeddings=bool(settings.get("tie_word_embeddings", False)),
        positions="rotary",
        rotary_base=float(rope.get("rope_theta") or settings.get("rope_theta", 10_000.0)),
    )


def require_exportable(shape: ModelConfig) -> None:
    """Raises ConfigError, naming the field, for a model that neither Llama nor Qwen3 is."""
    wanted = {"norm": "rms_norm", "feed_forward": "swiglu", "positions": "rotary", "embedding_norm": False}
    wanted["qk_norm_per_head"] = shape.qk_norm  # Qwen3's is over each head
    for field, value in wanted.items():
        if getattr(shape, field) != value:
            raise ConfigError(
                f"model.{field}={getattr(shape, field)} cannot be exported: transformers' Llama and Qwen3 have {value}"
            )


def _settings(shape: ModelConfig, rows: int, sequence_length: int) -> dict:
    require_exportable(shape)
    kind = "qwen3" if shape.qk_norm else "llama"
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": rows,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn_hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": sequence_length,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rotary_base,  # for transformers before 5, which has the next
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rotary_base},
        "tie_word_embeddings": shape.tied_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
    }


def _parts(shape: ModelConfig, name: str, rows: int) -> tuple[int, ...]:
    """Rows of each of ``their_names(name)``."""
    if name.endswith("in_proj.weight"):
        kv = shape.key_value_heads * shape.head_dim
        return (shape.heads * shape.head_dim, kv, kv)
    return (shape.ffn_hidden,) * 2 if name.endswith("w12.weight") else (rows,)


def _their_sizes(shape: ModelConfig, rows: int) -> dict[str, tuple[int, ...]]:
    expected = {}
    for name, size in sizes(shape, rows).items():
        for their_name, part in zip(their_names(name), _parts(shape, name, size[0]), strict=True):
            expected[their_name] = (part, *size[1:])
    return expected


def _their_reader(weights: ModelWeights) -> Callable[[str], Tensor]:
    """Tensors by Hugging Face's names, from ours."""
    whole = sizes(weights.shape, weights.rows)
    read_whole = functools.lru_cache(1)(weights.read)  # its parts are asked for one after another
    where = {theirs: (name, number) for name in whole for number, theirs in enumerate(their_names(name))}

    def read(their_name: str) -> Tensor:
        name, number = where[their_name]
        tensor = read_whole(name)
        if weights.vocab and name in TABLES:
            return torch.cat([tensor[start:stop] for start, stop in weights.vocab.ranges])
        return tensor.split(_parts(weights.shape, name, whole[name][0]))[number]

    return read


def _spread(table: Tensor, vocab: VocabLayout) -> Tensor:
    """The rows of an exported table at their unified ids; rows that no id uses are 0."""
    unified = table.new_zeros((vocab.size, table.shape[1]))
    start = 0
    for low, high in vocab.ranges:
        unified[low:high] = table[start : start + high - low]
        start += high - low
    return unified


def _vocab_content(vocab: VocabLayout) -> dict:
    ranges = [
        {"unified": [low, high], "exported": [exported_id(vocab, low), exported_id(vocab, high - 1) + 1]}
        for low, high in vocab.ranges
    ]
    return {"format": FORMAT, **dataclasses.asdict(vocab), "ranges": ranges}


def _read_vocab(path: Path, rows: int) -> VocabLayout:
    content = read_json_object(path, "Restore the original file")
    try:
        vocab = VocabLayout(content["text_tokens"], content["image_codes"])
        if content != _vocab_content(vocab):
            raise ValueError("its ranges are not those of its sizes")
    except (ValueError, KeyError, TypeError) as error:
        problem = f"not the vocabulary of an exported model ({error!r})"
        raise DataFileError(path, problem, "Export the model again") from error
    if sum(stop - start for start, stop in vocab.ranges) != rows:
        raise DataFileError(path, f"belongs to another model: vocab_size is {rows}", "Export the model again")
    return vocab


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
