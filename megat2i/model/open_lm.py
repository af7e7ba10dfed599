"""open_lm checkpoints as models: its parameter dictionary and state dictionaries (facts: open_lm commit 9bb92ef1).

The released 1B uses ``head_rotary``, which rotates q and k of one head by the same angle and so cancels: it is loaded
as "no positions" (open_lm issue 4, xformers issue 841).
"""

from pathlib import Path
from pickle import UnpicklingError

import torch

from megat2i.config import ModelConfig
from megat2i.kernels import choose_ops
from megat2i.model.gpt import GPT

NORMS = {
    "default_layer_norm": "layer_norm",
    "lp_layer_norm": "layer_norm",
    "gain_only_layer_norm": "layer_norm_gain_only",
    "gain_only_lp_layer_norm": "layer_norm_gain_only",
    "rms_norm": "rms_norm",
}
POSITIONS = {"head_rotary": "none", "none": "none", "rotary": "rotary"}
FEED_FORWARDS = ("swiglu", "swiglu_torch")

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


def load(path: str | Path, params: dict | None = None) -> GPT:
    """A float32 model from an open_lm ``.pt`` file; ``params``: open_lm's own dictionary (default: the released 1B).

    The model has exactly ``vocab_size`` rows and no masked columns. Nothing in the file is executed (``weights_only``).
    Raises ValueError for parameters that are not supported or a state that does not fit them.
    """
    params = params or RELEASED_1B
    try:
        file = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path}: does not hold weights alone (an optimizer file, a damaged file?); nothing in it was run"
        ) from error
    state = file.get("state_dict", file) if isinstance(file, dict) else file
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        kind = "an optimizer file" if isinstance(file, dict) and "optimizer" in file else "something else"
        raise ValueError(f"{path}: holds {kind}, not the weights of a model")
    state = {name.replace("module.", "").replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    state = {name: tensor for name, tensor in state.items() if not name.endswith("inv_freq")}
    rows = params["vocab_size"]
    model = GPT(model_shape(params), rows, ((0, rows),), choose_ops(torch.device("cpu"), torch.float32))
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in state.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ValueError(
            f"{path}: does not hold this model: {len(wrong)} tensors differ, first '{wrong[0]}': "
            f"expected shape {expected.get(wrong[0])}, found {found.get(wrong[0])}"
        )
    model.load_state_dict(state)
    return model


def model_shape(params: dict) -> ModelConfig:
    """Our description of open_lm's ``params``; raises ValueError for a variant that is not supported."""
    for key, supported in (("norm_type", NORMS), ("positional_embedding_type", POSITIONS), ("ffn_type", FEED_FORWARDS)):
        if params[key] not in supported:
            raise ValueError(f"open_lm parameter {key}='{params[key]}' is not supported; known: {', '.join(supported)}")
    for key in ("weight_tying", "post_embed_norm"):
        if params[key]:
            raise ValueError(f"open_lm parameter {key}=True is not supported")
    return ModelConfig(
        hidden=params["dim"],
        layers=params["n_layers"],
        heads=params["n_heads"],
        norm=NORMS[params["norm_type"]],
        norm_eps=params["norm_eps"],
        qk_norm=params["apply_qk_norm"],
        positions=POSITIONS[params["positional_embedding_type"]],
    )
