"""Selective tuning: which parameters learn under ``training.trainable``, by their global names.

The policies are those of Zhang et al. 2024, section 3.1 and Fig. 6: token embedding and output, all rows of both; these
and every norm (and positional embeddings, which no model here has); and with the norms either all of the first half of
the layers (rounded down), or the feed-forward products of all layers. What does not learn keeps its bits and has
neither gradients nor optimizer state.
"""

from math import prod

import torch

from megat2i.config import Config, ConfigError
from megat2i.kernels import choose_ops
from megat2i.model.gpt import GPT
from megat2i.model.part import Part, all_stages
from megat2i.model.weights import TABLES, sizes


def is_trainable(name: str, policy: str, layers: int) -> bool:
    """Whether the parameter ``name`` of a model of ``layers`` layers learns; ``policy``: see ``training.trainable``."""
    parts = name.split(".")
    tables, norms = name in TABLES, parts[-2].endswith("norm")
    first_half = parts[0] == "layers" and int(parts[1]) < layers // 2
    feed_forward = not {"feed_forward", "_ff_w1", "_ff_w2"}.isdisjoint(parts)
    return {
        "all": True,
        "embeddings": tables,
        "embeddings_norms": tables or norms,
        "embeddings_norms_first_half": tables or norms or first_half,
        "embeddings_norms_feed_forward": tables or norms or feed_forward,
    }[policy]


def freeze(model: GPT, policy: str) -> None:
    """Take gradients from what does not learn; to be called before an engine is made, which takes the others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trainable(name, policy, model.shape.layers))


def trained_parameters(settings: Config) -> int:
    """Elements of the whole model that learn."""
    shape, policy = settings.model, settings.training.trainable
    found = sizes(shape, settings.vocab_layout.size).items()
    return sum(prod(size) for name, size in found if is_trainable(name, policy, shape.layers))


def require_work_for_all(settings: Config) -> None:
    """Raises ConfigError where nothing learns on some pipeline rank. A stage of it may have nothing: a rank may not."""
    shape, vocab, policy = settings.model, settings.vocab_layout, settings.training.trainable
    ranks, stages = settings.parallel.pipeline, all_stages(settings)
    for rank in range(ranks if policy != "all" else 0):
        part, ops = Part(stages=stages[rank::ranks]), choose_ops(torch.device("cpu"), torch.float32)
        with torch.device("meta"):
            model = GPT(shape, vocab.size, vocab.ranges, ops, part=part)
        if not any(is_trainable(name, policy, shape.layers) for name, _ in model.named_parameters()):
            layers = ", ".join(f"{stage.first} to {stage.stop - 1}" for stage in part.stages)
            raise ConfigError(
                f"training.trainable={policy} with parallel.pipeline={ranks}: nothing learns on pipeline rank {rank}, "
                f"which holds layers {layers} alone; with parallel.pipeline=2 every rank has the embedding or the "
                "output (share the layers by parallel.tensor instead)"
            )
