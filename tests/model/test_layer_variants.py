"""Other kinds of layers than open_lm-1b's, over tensor-parallel ranks and recomputed: as on one rank."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from distributed import RankError, run_ranks

from megat2i.config import ConfigError, ModelConfig, ParallelConfig
from megat2i.config_rules import validate
from megat2i.kernels import choose_ops
from megat2i.model import layers
from megat2i.model.gpt import GPT
from megat2i.model.part import WHOLE_MODEL, Part
from megat2i.parallel.collectives import TensorParallel
from megat2i.vocab import VocabLayout

VOCAB = VocabLayout(text_tokens=200, image_codes=200)
SHAPE = ModelConfig(hidden=32, layers=2, heads=4, ffn=48)
OPS = choose_ops(torch.device("cpu"), torch.float64)
VARIANTS = {
    "grouped": {"kv_heads": 2, "positions": "rotary"},
    "grouped, norm over all heads": {"kv_heads": 2, "qk_norm": True},
    "norm per head": {"kv_heads": 2, "qk_norm": True, "qk_norm_per_head": True, "norm": "rms_norm"},
    "norm per head, bias, interleaved": {"qk_norm": True, "qk_norm_per_head": True, "positions": "rotary_interleaved"},
    "wide heads": {"head_width": 12, "positions": "rotary_interleaved"},
    "gelu": {"feed_forward": "gelu", "ffn": None},
    "tied": {"tied_embeddings": True, "embedding_norm": True},
    "no gain": {"norm": "layer_norm_no_gain", "qk_norm": True, "embedding_norm": True},
    "no gain per head": {"norm": "layer_norm_no_gain", "qk_norm": True, "qk_norm_per_head": True},
}
GENERATOR = torch.Generator().manual_seed(0)
TOKENS = torch.cat([torch.randint(start, stop, (2, 8), generator=GENERATOR) for start, stop in VOCAB.ranges], dim=1)
TARGETS = TOKENS.roll(-1, dims=1)


def make(shape: ModelConfig, part: Part = WHOLE_MODEL) -> GPT:
    cpu = torch.device("cpu")
    model = GPT.empty(shape, VOCAB, OPS, cpu, torch.float64, part)
    model.initialise(0)
    with torch.no_grad():  # gains and biases that show
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                whole = torch.randn(model.shards()[name].shape, generator=torch.Generator().manual_seed(len(name)))
                parameter.add_(0.2 * model.shards()[name].cut(whole))
    return model


def gradients(model: GPT) -> tuple[float, dict[str, torch.Tensor]]:
    loss = model.loss(TOKENS, TARGETS)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def require_equal(shape: ModelConfig, sequence: bool, recompute: str) -> None:
    loss, right = gradients(make(shape))

    def on_rank():
        parallel = TensorParallel(dist.group.WORLD, dist.get_rank(), 2, sequence)
        model = make(shape, Part(parallel, recompute=recompute))
        shards, (found, parts) = model.shards(), gradients(model)
        assert found == pytest.approx(loss, rel=1e-12)
        assert parts.keys() == right.keys() == shards.keys()
        for name, gradient in parts.items():
            torch.testing.assert_close(gradient, shards[name].cut(right[name]), rtol=1e-9, atol=1e-13, msg=name)

    run_ranks(2, on_rank)


@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_are_one(name):
    shape = replace(SHAPE, **VARIANTS[name])
    for sequence, recompute in ((False, "none"), (True, "selective")):
        require_equal(shape, sequence, recompute)


def test_a_gain_whose_gradients_are_not_summed_is_noticed(monkeypatch):
    monkeypatch.setattr(layers, "summed_gradient", lambda parameter, parallel: parameter)
    with pytest.raises(RankError, match="attention.q_norm.weight"):
        require_equal(replace(SHAPE, **VARIANTS["norm per head"]), False, "none")


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_what_is_computed_again_is_the_same(name, recompute):
    shape = replace(SHAPE, **VARIANTS[name])
    loss, right = gradients(make(shape))
    found, again = gradients(make(shape, Part(recompute=recompute)))
    assert found == loss
    for parameter, gradient in again.items():
        assert torch.equal(gradient, right[parameter]), parameter


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_the_cache_is_the_whole_row(name):
    model = make(replace(SHAPE, **VARIANTS[name]))
    expected = model.logits(TOKENS)
    cache = model.new_cache(2, 16)
    steps = [model.logits(TOKENS[:, :9], cache)] + [model.logits(TOKENS[:, at : at + 1], cache) for at in range(9, 16)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected)
    heads = model.shape.kv_heads or 4
    assert next(iter(cache.layers.values())).keys.shape[1] == heads


@torch.no_grad()
def test_grouped_heads_are_repeated_keys_and_values():
    """The same as a model with all heads whose keys and values were copied for every query head of a group."""
    grouped = make(replace(SHAPE, kv_heads=2, positions="rotary"))
    whole = make(replace(SHAPE, positions="rotary"))
    state = {name: p for name, p in grouped.named_parameters()}
    for name, parameter in whole.named_parameters():
        values = state[name]
        if name.endswith("in_proj.weight"):
            q, k, v = values.split((32, 16, 16))
            k, v = (t.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1) for t in (k, v))
            values = torch.cat((q, k, v))
        parameter.copy_(values)
    torch.testing.assert_close(grouped.logits(TOKENS), whole.logits(TOKENS))


def test_a_tied_table_is_one_parameter():
    tied = make(replace(SHAPE, tied_embeddings=True))
    assert tied.output.weight is tied.tok_embeddings.weight
    names = [name for name, _ in tied.named_parameters()]
    assert "tok_embeddings.weight" in names and "output.weight" not in names
    assert tied.shards().keys() == set(names)


@pytest.mark.parametrize(
    ("model", "parallel", "problem"),
    [
        ({"tied_embeddings": True}, {"pipeline": 2}, "model.tied_embeddings=true with parallel.pipeline=2"),
        ({"kv_heads": 1}, {"tensor": 2}, "model.kv_heads=1 is not divisible by parallel.tensor=2"),
        ({"kv_heads": 3}, {}, "model.heads=4 is not a multiple of model.kv_heads=3"),
        ({"qk_norm_per_head": True}, {}, "model.qk_norm_per_head=true needs model.qk_norm=true"),
        ({"expansion": "file"}, {}, "model.expansion_file"),
        ({"positions": "rotary_interleaved", "head_width": 3}, {}, "even head width, got 3"),
    ],
)
def test_what_cannot_be_is_refused(run_config, tmp_path, model, parallel, problem):
    config = run_config(tmp_path)
    config = replace(config, model=replace(config.model, **model), parallel=ParallelConfig(**parallel))
    with pytest.raises(ConfigError, match=problem):
        validate(config, 2)
