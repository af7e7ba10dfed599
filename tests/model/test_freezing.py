"""Selective tuning: every parameter of three models by hand, what a step computes, and what is refused."""

from dataclasses import replace

import pytest
import torch
from distributed import run_ranks
from torch.utils.flop_counter import FlopCounterMode

from megat2i.config import ConfigError, ModelConfig
from megat2i.loss import ModalityLoss
from megat2i.model import freezing
from megat2i.model.freezing import freeze, is_trainable, require_work_for_all, trained_parameters
from megat2i.model.part import all_stages
from megat2i.model.weights import sizes
from megat2i.trainer import train_step

POLICIES = {
    "E": "embeddings",
    "N": "embeddings_norms",
    "H": "embeddings_norms_first_half",
    "F": "embeddings_norms_feed_forward",
}
SMALL = ModelConfig(hidden=16, heads=2, ffn=24, layers=3)

# A model, and of each of its parameters under which policies it learns.
OPEN_LM = """
    tok_embeddings.weight             E N H F
    layers.0.attention_norm.weight    . N H F
    layers.0.attention_norm.bias      . N H F
    layers.0.attention.in_proj.weight . . H .
    layers.0.attention.out_proj.weight . . H .
    layers.0.attention.q_norm.weight  . N H F
    layers.0.attention.q_norm.bias    . N H F
    layers.0.attention.k_norm.weight  . N H F
    layers.0.attention.k_norm.bias    . N H F
    layers.0.ffn_norm.weight          . N H F
    layers.0.ffn_norm.bias            . N H F
    layers.0.feed_forward.w12.weight  . . H F
    layers.0.feed_forward.w3.weight   . . H F
    layers.1.attention_norm.weight    . N H F
    layers.1.attention_norm.bias      . N H F
    layers.1.attention.in_proj.weight . . . .
    layers.1.attention.out_proj.weight . . . .
    layers.1.attention.q_norm.weight  . N H F
    layers.1.attention.q_norm.bias    . N H F
    layers.1.attention.k_norm.weight  . N H F
    layers.1.attention.k_norm.bias    . N H F
    layers.1.ffn_norm.weight          . N H F
    layers.1.ffn_norm.bias            . N H F
    layers.1.feed_forward.w12.weight  . . . F
    layers.1.feed_forward.w3.weight   . . . F
    layers.2.attention_norm.weight    . N H F
    layers.2.attention_norm.bias      . N H F
    layers.2.attention.in_proj.weight . . . .
    layers.2.attention.out_proj.weight . . . .
    layers.2.attention.q_norm.weight  . N H F
    layers.2.attention.q_norm.bias    . N H F
    layers.2.attention.k_norm.weight  . N H F
    layers.2.attention.k_norm.bias    . N H F
    layers.2.ffn_norm.weight          . N H F
    layers.2.ffn_norm.bias            . N H F
    layers.2.feed_forward.w12.weight  . . . F
    layers.2.feed_forward.w3.weight   . . . F
    norm.weight                       . N H F
    norm.bias                         . N H F
    output.weight                     E N H F
"""
GELU = """
    tok_embeddings.weight             E N H F
    post_embed_norm.weight            . N H F
    layers.0.attention_norm.weight    . N H F
    layers.0.attention.in_proj.weight . . H .
    layers.0.attention.out_proj.weight . . H .
    layers.0.ffn_norm.weight          . N H F
    layers.0._ff_w1.weight            . . H F
    layers.0._ff_w2.weight            . . H F
    layers.1.attention_norm.weight    . N H F
    layers.1.attention.in_proj.weight . . . .
    layers.1.attention.out_proj.weight . . . .
    layers.1.ffn_norm.weight          . N H F
    layers.1._ff_w1.weight            . . . F
    layers.1._ff_w2.weight            . . . F
    norm.weight                       . N H F
    output.weight                     E N H F
"""
TIED = """
    tok_embeddings.weight             E N H F
    layers.0.attention_norm.weight    . N H F
    layers.0.attention.in_proj.weight . . H .
    layers.0.attention.out_proj.weight . . H .
    layers.0.attention.q_norm.weight  . N H F
    layers.0.attention.k_norm.weight  . N H F
    layers.0.ffn_norm.weight          . N H F
    layers.0.feed_forward.w12.weight  . . H F
    layers.0.feed_forward.w3.weight   . . H F
    layers.1.attention_norm.weight    . N H F
    layers.1.attention.in_proj.weight . . . .
    layers.1.attention.out_proj.weight . . . .
    layers.1.attention.q_norm.weight  . N H F
    layers.1.attention.k_norm.weight  . N H F
    layers.1.ffn_norm.weight          . N H F
    layers.1.feed_forward.w12.weight  . . . F
    layers.1.feed_forward.w3.weight   . . . F
    norm.weight                       . N H F
"""
MODELS = {
    "open_lm": (replace(SMALL, qk_norm=True), OPEN_LM),
    "gelu": (
        replace(SMALL, layers=2, feed_forward="gelu", norm="layer_norm_gain_only", embedding_norm=True),
        GELU,
    ),
    "tied, rms_norm": (
        replace(SMALL, layers=2, norm="rms_norm", qk_norm=True, qk_norm_per_head=True, tied_embeddings=True),
        TIED,
    ),
}


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_under_every_policy(model):
    shape, table = MODELS[model]
    by_hand = {name: letters for name, *letters in map(str.split, table.strip().splitlines())}
    assert by_hand.keys() == sizes(shape, 300).keys()
    for letter, policy in POLICIES.items():
        learn = {name for name in by_hand if is_trainable(name, policy, shape.layers)}
        assert learn == {name for name, letters in by_hand.items() if letter in letters}, policy
    assert all(is_trainable(name, "all", shape.layers) for name in by_hand)


def test_a_policy_that_does_not_exist_is_an_error():
    with pytest.raises(KeyError):
        is_trainable("norm.weight", "norms", 2)


@pytest.mark.parametrize("model", MODELS)
def test_the_number_of_trained_parameters(tiny_config, model):
    config = replace(tiny_config, model=MODELS[model][0])
    rows, hidden = config.vocab_layout.size, 16
    numbers = {}
    for policy in ("all", *POLICIES.values()):
        numbers[policy] = trained_parameters(replace(config, training=replace(config.training, trainable=policy)))
    assert numbers["embeddings"] == rows * hidden * (1 if config.model.tied_embeddings else 2)
    assert numbers["all"] == sum(torch.Size(size).numel() for size in sizes(config.model, rows).values())
    ordered = [numbers[policy] for policy in ("embeddings", "embeddings_norms", "embeddings_norms_first_half", "all")]
    assert ordered == sorted(ordered) and len(set(ordered)) == 4


@pytest.fixture(scope="module")
def flops(make_training, make_batches, tiny_config):
    """Function of (policy, schedule's settings) -> (FLOPs of matrix products in one step, names with a gradient)."""

    def count(policy: str, **parallel) -> tuple[int, int]:
        def on_rank() -> tuple[int, int]:
            config = replace(
                tiny_config,
                training=replace(tiny_config.training, trainable=policy),
                parallel=replace(tiny_config.parallel, **parallel),
            )
            pipeline, engine, groups = make_training("torch", config)
            batches = make_batches(config, 0, groups.data_rank, groups.data_size)
            with FlopCounterMode(display=False) as counter:
                train_step(pipeline, engine, batches, ModalityLoss((1.0, 1.0, 1.0)), groups, 1e-2)
            tokens = sum(batch.tokens.numel() for batch in batches)
            matrices = {
                n: p.numel() for n, p in pipeline.model.named_parameters() if n.startswith("layers") and p.dim() == 2
            }
            frozen = sum(size for n, size in matrices.items() if not is_trainable(n, policy, config.model.layers))
            return counter.get_total_flops(), 2 * tokens * frozen

        return run_ranks(parallel.get("pipeline", 1), on_rank)[0]

    return count


@pytest.mark.parametrize(
    "parallel",
    [
        {},
        {"recompute": "selective"},
        {"recompute": "full"},
        {"schedule": "zero_bubble"},
        {"pipeline": 2, "schedule": "zero_bubble"},
    ],
    ids=str,
)
def test_no_weight_gradient_of_a_frozen_matrix_is_computed(flops, parallel):
    whole, _ = flops("all", **parallel)
    for policy in POLICIES.values():
        found, saved = flops(policy, **parallel)
        assert found == whole - saved, policy
        assert saved > 0 or (policy == "embeddings_norms_first_half" and parallel.get("pipeline") == 2)


def test_the_count_of_products_notices_a_gradient_that_nobody_needs(flops, monkeypatch):
    monkeypatch.setattr(freezing, "is_trainable", lambda name, policy, layers: True)
    assert flops("embeddings")[0] == flops("all")[0]


def selective(tiny_config, policy: str, model: dict, **parallel):
    return replace(
        tiny_config,
        model=replace(tiny_config.model, layers=8, **model),
        training=replace(tiny_config.training, trainable=policy),
        parallel=replace(tiny_config.parallel, **parallel),
    )


@pytest.mark.parametrize(
    ("policy", "model", "parallel", "idle"),
    [
        ("embeddings", {}, {"pipeline": 2}, None),
        ("embeddings", {}, {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 4}, None),
        ("embeddings", {}, {"pipeline": 4}, 1),
        ("embeddings", {}, {"pipeline": 4, "schedule": "interleaved", "virtual_stages": 2}, 1),
        ("embeddings_norms", {}, {"pipeline": 4}, None),
        ("embeddings_norms", {"norm": "layer_norm_no_gain"}, {"pipeline": 4}, 1),
        ("embeddings_norms_first_half", {"norm": "layer_norm_no_gain"}, {"pipeline": 4}, 2),
        ("embeddings_norms_feed_forward", {"norm": "layer_norm_no_gain"}, {"pipeline": 4}, None),
        ("all", {"norm": "layer_norm_no_gain"}, {"pipeline": 4}, None),
    ],
)
def test_a_rank_with_nothing_to_train_is_refused_and_named(tiny_config, policy, model, parallel, idle):
    """A stage may have nothing, beside one on the same rank that has."""
    config = selective(tiny_config, policy, model, **parallel)
    if idle is None:
        require_work_for_all(config)
        return
    held = ", ".join(f"{s.first} to {s.stop - 1}" for s in all_stages(config)[idle :: parallel["pipeline"]])
    words = (
        f"trainable={policy} with parallel.pipeline=4: nothing learns on pipeline rank {idle}, which .* {held} alone"
    )
    with pytest.raises(ConfigError, match=words):
        require_work_for_all(config)


def test_what_is_frozen_may_be_thawed(make_training, tiny_config):
    """The policy decides alone, not what was frozen before."""

    def run():
        model = make_training(None, tiny_config)[0].model
        freeze(model, "embeddings")
        freeze(model, "embeddings_norms")
        return {name for name, p in model.named_parameters() if p.requires_grad}

    names = sizes(tiny_config.model, tiny_config.vocab_layout.size)
    expected = {name for name in names if is_trainable(name, "embeddings_norms", 2)}
    assert run_ranks(1, run) == [expected]
