"""Small random models of the real transformers library."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def make(kind: str, rows: int = 320, **settings) -> PreTrainedModel:
    """A model in float32 whose norms have gains that show."""
    torch.manual_seed(0)
    config, model = KINDS[kind]
    made = model(config(vocab_size=rows, **SMALL | {"num_key_value_heads": 2, "head_dim": 16} | settings))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, *((1.0, 0.2) if parameter.dim() == 1 else (0.0, 0.1)))
    return made.eval()


def save(folder: Path, kind: str, rows: int = 320, shard: str = "5GB", **settings) -> PreTrainedModel:
    """The model, saved by its own library."""
    made = make(kind, rows, **settings)
    made.save_pretrained(folder, max_shard_size=shard)
    return made
