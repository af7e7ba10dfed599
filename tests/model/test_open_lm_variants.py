"""Every variant of open_lm's configurations against its forward pass written a second time, in float64."""

import pytest
import torch
from open_lm_reference import logits, make_state
from torch.nn import functional as F

from megat2i.config import ConfigError
from megat2i.files import DataFileError
from megat2i.model import open_lm

BASE = open_lm.RELEASED_1B | {"dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 96, "seq_len": 64}
VARIANTS = [
    {},
    {"norm_type": "lp_layer_norm", "positional_embedding_type": "none"},
    {"norm_type": "gain_only_layer_norm", "positional_embedding_type": "rotary", "ffn_type": "swiglu_torch"},
    {"norm_type": "gain_only_lp_layer_norm", "apply_qk_norm": True, "positional_embedding_type": "rotary"},
    {"norm_type": "no_wb_layer_norm", "apply_qk_norm": True, "post_embed_norm": True},
    {"norm_type": "rms_norm", "apply_qk_norm": True, "positional_embedding_type": "llama_rotary"},
    {"ffn_type": "gelu", "positional_embedding_type": "rotary"},
    {"weight_tying": True, "post_embed_norm": True, "positional_embedding_type": "llama_rotary"},
    {"ffn_type": "gelu", "weight_tying": True},
    {"dim": 74, "positional_embedding_type": "rotary"},  # heads of 18, together 72
]
TOKENS = torch.randint(0, 96, (2, 21), generator=torch.Generator().manual_seed(1))
TARGETS = torch.randint(0, 96, (2, 21), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def load(tmp_path):
    """Function of (params, state) -> the model in a file of them."""

    def make(params, state):
        torch.save({"epoch": 1, "state_dict": state}, tmp_path / "epoch_1.pt")
        return open_lm.load(tmp_path / "epoch_1.pt", params)

    return make


def expected(params, state):
    """Logits, loss, and gradients of it by name, computed in float64; what is one matrix has one gradient."""
    wide = {name: tensor.double().requires_grad_() for name, tensor in state.items()}
    if params["weight_tying"]:
        wide["output.weight"] = wide["tok_embeddings.weight"]
    out = logits(params, wide, TOKENS)
    loss = F.cross_entropy(out.flatten(0, 1), TARGETS.flatten())
    loss.backward()
    return out.detach(), loss.detach(), {name: t.grad for name, t in wide.items() if t.grad is not None}


@pytest.mark.parametrize("change", VARIANTS, ids=str)
def test_every_variant(load, change):
    params = BASE | change
    state = make_state(params)
    model = load(params, state)
    right, loss, gradients = expected(params, state)
    assert (model.logits(TOKENS) - right).abs().max() < 5e-5
    found = model.loss(TOKENS, TARGETS)
    assert abs(found.item() - loss.item()) < 1e-5
    found.backward()
    named = dict(model.named_parameters())
    gradients.pop("output.weight" if params["weight_tying"] else "", None)
    assert named.keys() == gradients.keys()
    for name, parameter in named.items():
        assert (parameter.grad - gradients[name]).norm() < 1e-4 * gradients[name].norm(), name
    with torch.no_grad():
        cache = model.new_cache(2, 21)
        steps = [model.logits(TOKENS[:, :15], cache)]
        steps += [model.logits(TOKENS[:, at : at + 1], cache) for at in range(15, 21)]
    assert (torch.cat(steps, dim=1) - right).abs().max() < 5e-5


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"positional_embedding_type": "llama_rotary"}, {"positional_embedding_type": "rotary"}),
        ({"positional_embedding_type": "rotary"}, {"positional_embedding_type": "llama_rotary"}),
        ({"norm_type": "rms_norm"}, {"norm_type": "gain_only_layer_norm"}),
        ({"norm_type": "no_wb_layer_norm", "post_embed_norm": True}, {"post_embed_norm": False}),
    ],
    ids=str,
)
def test_another_variant_is_noticed(load, change, wrong):
    """Variants whose files hold the same tensors: the file cannot tell, the comparison does."""
    params = BASE | change
    state = make_state(params)
    right, _, _ = expected(params, state)
    with torch.no_grad():
        assert (load(params | wrong, state).logits(TOKENS) - right).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["a_ln_headrotary_swiglu", "c_gainlp_qknorm_rotary_swiglutorch"])
def test_the_second_writing_is_open_lm(golden, name):
    content = torch.load(golden / "open_lm" / f"{name}.pt", weights_only=True)
    found = logits(content["params"], content["state_dict"], content["input_ids"])
    assert (found - content["logits"]).abs().max() < 5e-5


@pytest.mark.parametrize(
    ("change", "name", "other"),
    [
        ({"weight_tying": True}, "output.weight", "tok_embeddings.weight"),
        ({"ffn_type": "gelu"}, "layers.1.feed_forward.2.weight", "layers.1._ff_w2.weight"),
    ],
)
def test_what_is_saved_twice_may_be_saved_once_and_must_agree(load, change, name, other):
    params = BASE | change
    state = make_state(params)
    with torch.no_grad():
        both = load(params, state).logits(TOKENS)
        assert torch.equal(load(params, {n: t for n, t in state.items() if n != name}).logits(TOKENS), both)
        if "ffn_type" in change:  # either name
            assert torch.equal(load(params, {n: t for n, t in state.items() if n != other}).logits(TOKENS), both)
    with pytest.raises(DataFileError, match=f"{name} differs from {other}"):
        load(params, state | {name: state[name] + 1})


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"norm_type": "batch_norm"}, "norm_type"),
        ({"positional_embedding_type": "alibi"}, "positional_embedding_type"),
        ({"ffn_type": "gemma_geglu"}, "ffn_type"),
        ({"ffn_type": "moe"}, "ffn_type"),
        ({"moe_freq": 2}, "moe_freq"),
        ({"positional_embeding_type": "rotary"}, "unknown: positional_embeding_type"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(load, change, key):
    with pytest.raises(ConfigError, match=key):
        load(BASE | change, make_state(BASE))


def test_a_parameter_without_a_default_is_missing(load):
    with pytest.raises(ConfigError, match="missing: n_heads"):
        load({name: value for name, value in BASE.items() if name != "n_heads"}, make_state(BASE))


def test_a_model_config_of_open_lm_is_understood():
    """Its JSON files have other names, and leave to the trainer's flags what has a default there."""
    config = {"hidden_dim": 96, "n_layers": 8, "n_heads": 4, "seq_len": 2048, "vocab_size": 50432}
    config |= {"post_embed_norm": False, "weight_tying": False, "model_norm": "gain_only_lp_layer_norm"}
    shape = open_lm.model_shape(open_lm.complete(config | {"qk_norm": True}))
    assert (shape.hidden, shape.qk_norm, shape.norm, shape.positions) == (96, True, "layer_norm_gain_only", "rotary")
