"""open_lm checkpoints as models: its parameter dictionary and its weight files (facts: open_lm commit 9bb92ef1).

The released 1B uses ``head_rotary``, which rotates q and k of one head by the same angle and so cancels: it is loaded
as "no positions" (open_lm issue 4, xformers issue 841).
"""

from pathlib import Path

import torch
from torch import Tensor

from megat2i.config import ConfigError, ModelConfig
from megat2i.files import DataFileError
from megat2i.kernels import choose_ops
from megat2i.model.gpt import GPT
from megat2i.model.weights import ModelWeights, fill, require_sizes, sizes
from megat2i.weights_file import WeightFiles

NORMS = {
    "default_layer_norm": "layer_norm",
    "lp_layer_norm": "layer_norm",
    "gain_only_layer_norm": "layer_norm_gain_only",
    "gain_only_lp_layer_norm": "layer_norm_gain_only",
    "no_wb_layer_norm": "layer_norm_no_gain",
    "rms_norm": "rms_norm",
}
POSITIONS = {"head_rotary": "none", "none": "none", "rotary": "rotary", "llama_rotary": "rotary_interleaved"}
FEED_FORWARDS = {"swiglu": "swiglu", "swiglu_torch": "swiglu", "gelu": "gelu"}

# open_lm_1b_old of open_lm's model_configs: the recipe of the released 1B
RELEASED_1B = {
    "dim": 2048,
    "n_layers": 24,
    "n_heads": 16,
    "vocab_size": 50432,
    "norm_eps": 1e-5,
    "seq_len": 2048,
    "post_embed_norm": False,
    "weight_tying": False,
    "norm_type": "default_layer_norm",
    "apply_qk_norm": False,
    "positional_embedding_type": "head_rotary",
    "ffn_type": "swiglu",
}
# Of these open_lm has defaults; its model_configs and its trainer's flags have other names for some.
DEFAULTS = {
    "norm_eps": 1e-5,
    "seq_len": 2048,
    "post_embed_norm": False,
    "weight_tying": False,
    "norm_type": "default_layer_norm",
    "apply_qk_norm": False,
    "positional_embedding_type": "rotary",
    "ffn_type": "swiglu",
    "moe_freq": 0,
}
OTHER_NAMES = {"hidden_dim": "dim", "model_norm": "norm_type", "qk_norm": "apply_qk_norm"}
# what DDP, torch.compile, FSDP and activation checkpointing put into names
WRAPPING = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
WRAPPERS = ("state_dict", "av_model_sd")  # of an epoch's file; of the averager's (EMA)


def load(path: str | Path, params: dict | None = None) -> GPT:
    """A float32 model from an open_lm ``.pt`` file; ``params``: open_lm's own dictionary (default: the released 1B).

    The model has exactly ``vocab_size`` rows and no masked columns. Nothing in the file is executed (``weights_only``).
    Raises ValueError for parameters that are not supported or a state that does not fit them.
    """
    weights = open_weights(path, params)
    rows, device = weights.rows, torch.device("cpu")
    model = GPT(weights.shape, rows, ((0, rows),), choose_ops(device, torch.float32))
    fill(model, weights.read)
    return model


def open_weights(path: str | Path, params: dict | None = None) -> ModelWeights:
    """The weights in an open_lm file, to be read tensor by tensor; arguments and errors as of ``load``."""
    params = RELEASED_1B if params is None else complete(params)
    shape, rows = model_shape(params), params["vocab_size"]
    files = WeightFiles(path, WRAPPERS)
    names = _own_names(files)
    copies = _copies(names, shape)
    specs = {name: files.specs[file_name] for name, file_name in names.items() if name not in copies}
    require_sizes(files.path, specs, sizes(shape, rows))

    def read(name: str) -> Tensor:
        tensor = files.read(names[name])
        for copy in (copy for copy, original in copies.items() if original == name):
            if not torch.equal(files.read(names[copy]), tensor):
                problem = f"{copy} differs from {name}, where this model has one matrix for both"
                raise DataFileError(path, problem, "Give the parameters that belong to the file")
        return tensor

    return ModelWeights(files.path, shape, rows, {name: spec.dtype for name, spec in specs.items()}, read)


def complete(params: dict) -> dict:
    """``params`` under the names of open_lm's model, with its defaults; raises ConfigError for unknown ones."""
    params = DEFAULTS | {OTHER_NAMES.get(name, name): value for name, value in params.items()}
    unknown = sorted(params.keys() - RELEASED_1B.keys() - DEFAULTS.keys())
    missing = sorted(RELEASED_1B.keys() - params.keys())
    if unknown or missing:
        problem = f"unknown: {', '.join(unknown)}" if unknown else f"missing: {', '.join(missing)}"
        raise ConfigError(f"open_lm parameters {problem}; known: {', '.join(RELEASED_1B)}")
    return params


def model_shape(params: dict) -> ModelConfig:
    """Our description of open_lm's ``params``; raises ConfigError for a variant that is not supported."""
    choices = (("norm_type", NORMS), ("positional_embedding_type", POSITIONS), ("ffn_type", FEED_FORWARDS))
    for key, supported in choices:
        if params[key] not in supported:
            known = ", ".join(supported)
            raise ConfigError(f"open_lm parameter {key}='{params[key]}' is not supported; known: {known}")
    if params.get("moe_freq"):
        raise ConfigError(f"open_lm parameter moe_freq={params['moe_freq']}: mixtures of experts are not supported")
    hidden, heads = params["dim"], params["n_heads"]
    return ModelConfig(
        hidden=hidden,
        layers=params["n_layers"],
        heads=heads,
        head_width=hidden // heads if hidden % heads else None,  # open_lm_87m: 12 heads of 40 for 488
        feed_forward=FEED_FORWARDS[params["ffn_type"]],
        norm=NORMS[params["norm_type"]],
        norm_eps=params["norm_eps"],
        qk_norm=params["apply_qk_norm"],
        embedding_norm=params["post_embed_norm"],
        tied_embeddings=params["weight_tying"],
        positions=POSITIONS[params["positional_embedding_type"]],
    )


def _own_names(files: WeightFiles) -> dict[str, str]:
    """Names in the file by our names, which are open_lm's without what wraps its modules and without its buffers."""
    names: dict[str, str] = {}
    for name in files.specs:
        segments = [segment for segment in name.split(".") if segment not in WRAPPING]
        own = ".".join(segments[1:] if segments[0] == "model" else segments)  # "model": its Hugging Face wrappers
        if own.endswith("inv_freq"):
            continue
        if own in names:
            raise DataFileError(files.path, f"holds both {names[own]} and {name}", "Pass a file of one model")
        names[own] = name
    # open_lm registers GELU's two matrices twice; either name may have been kept
    for name in list(names):
        for number, matrix in (("0", "_ff_w1"), ("2", "_ff_w2")):
            other = name.replace(f".feed_forward.{number}.weight", f".{matrix}.weight")
            if other != name and other not in names:
                names[other] = names.pop(name)
    return names


def _copies(names: dict[str, str], shape: ModelConfig) -> dict[str, str]:
    """Our names that stand for a matrix which the file holds under another name too, and that name."""
    copies = {}
    if shape.tied_embeddings and "output.weight" in names:
        copies["output.weight"] = "tok_embeddings.weight"
    if shape.feed_forward == "gelu":
        for layer in range(shape.layers):
            for number, matrix in (("0", "_ff_w1"), ("2", "_ff_w2")):
                if f"layers.{layer}.feed_forward.{number}.weight" in names:
                    copies[f"layers.{layer}.feed_forward.{number}.weight"] = f"layers.{layer}.{matrix}.weight"
    return copies
