"""Opening open_lm checkpoints: prefixes, wrappers, and files that are something else."""

import numpy as np
import pytest
import torch

from megat2i.model import open_lm

PARAMS = {
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "vocab_size": 24,
    "norm_eps": 1e-5,
    "seq_len": 16,
    "post_embed_norm": False,
    "weight_tying": False,
    "norm_type": "default_layer_norm",
    "apply_qk_norm": False,
    "positional_embedding_type": "head_rotary",
    "ffn_type": "swiglu",
}


@pytest.fixture
def state():
    """A state dictionary as open_lm writes it, with its buffers."""
    shapes = {"tok_embeddings.weight": (24, 16), "output.weight": (24, 16), "norm.weight": (16,), "norm.bias": (16,)}
    for layer in range(2):
        shapes |= {
            f"layers.{layer}.attention.in_proj.weight": (48, 16),
            f"layers.{layer}.attention.out_proj.weight": (16, 16),
            f"layers.{layer}.attention.pos_embed.inv_freq": (4,),
            f"layers.{layer}.feed_forward.w12.weight": (512, 16),
            f"layers.{layer}.feed_forward.w3.weight": (16, 256),
        }
        for norm in ("attention_norm", "ffn_norm"):
            shapes |= {f"layers.{layer}.{norm}.weight": (16,), f"layers.{layer}.{norm}.bias": (16,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.fixture
def save(tmp_path):
    def write(content):
        torch.save(content, tmp_path / "epoch_1.pt")
        return tmp_path / "epoch_1.pt"

    return write


PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "_fsdp_wrapped_module."]
FORMS = {
    "bare": lambda state: state,
    "epoch": lambda state: {"epoch": 1, "name": "x", "state_dict": state, "evaluation_loss": 1.0},
    "averages": lambda state: {"av_model_sd": state, "update_counter": 3, "method": "ema", "gamma": 0.9},
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("form", FORMS)
def test_prefixes_and_wrappers_are_taken_off(state, save, prefix, form):
    named = {prefix + name: tensor for name, tensor in state.items()}
    content = FORMS[form](named)
    loaded = open_lm.load(save(content), PARAMS).state_dict()
    expected = {name: tensor for name, tensor in state.items() if not name.endswith("inv_freq")}
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("lr", [1e-3, np.float64(1e-3)], ids=["float", "numpy"])
def test_an_optimizer_file_is_refused(save, lr):
    """open_lm's optimizer_N.pt holds NumPy scalars, which a file of weights does not."""
    group = {"lr": lr, "params": [0]}
    path = save({"epoch": 1, "name": "x", "optimizer": {"state": {0: {"step": 1}}, "param_groups": [group]}})
    with pytest.raises(ValueError, match="epoch_1.pt: an optimizer file"):
        open_lm.load(path, PARAMS)


def test_names_inside_are_cleaned_too(state, save):
    """FSDP and activation checkpointing wrap single layers."""
    named = {name.replace("layers.1.", "layers.1._checkpoint_wrapped_module."): t for name, t in state.items()}
    assert (
        open_lm.load(save(named), PARAMS).state_dict().keys() == open_lm.load(save(state), PARAMS).state_dict().keys()
    )
    with pytest.raises(ValueError, match="holds both module.norm.weight and norm.weight"):
        open_lm.load(save({"module.norm.weight": torch.ones(16), **state}), PARAMS)


def test_something_else_is_refused(save):
    with pytest.raises(ValueError, match="epoch_1.pt"):
        open_lm.load(save([torch.zeros(3)]), PARAMS)


@pytest.mark.parametrize("change", ["shape", "missing", "extra"])
def test_a_state_that_does_not_fit_is_refused(state, save, change):
    name = "layers.1.feed_forward.w3.weight"
    if change == "shape":
        state[name] = torch.zeros(16, 255)
    elif change == "missing":
        del state[name]
    else:
        name = "layers.2.attention.in_proj.weight"
        state[name] = torch.zeros(48, 16)
    with pytest.raises(ValueError, match=name):
        open_lm.load(save(state), PARAMS)


def test_code_in_a_file_is_not_run(save, tmp_path):
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self):
            return open, (str(marker), "w")

    path = save({"state_dict": Payload()})
    with pytest.raises(Exception, match="refused: besides tensors it holds .*open"):
        open_lm.load(path, PARAMS)
    assert not marker.exists()


def test_the_released_model_has_no_positions_and_its_published_size():
    shape = open_lm.model_shape(open_lm.RELEASED_1B)
    assert (shape.positions, shape.norm, shape.qk_norm, shape.head_dim, shape.ffn_hidden) == (
        "none",
        "layer_norm",
        False,
        128,
        5632,
    )
    with torch.device("meta"):
        from megat2i.kernels import choose_ops
        from megat2i.model.gpt import GPT

        rows = open_lm.RELEASED_1B["vocab_size"]
        model = GPT(shape, rows, ((0, rows),), choose_ops(torch.device("cpu"), torch.float32))
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_439_895_552
