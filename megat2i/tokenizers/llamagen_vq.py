"""LlamaGen's VQ-16 and VQ-8 (Sun et al. 2024, section 2.1): plain norms, a codebook of unit vectors.

VQ-16 turns 256 x 256 pixels into 16 x 16 codes, VQ-8 into 32 x 32, both of 16,384. The original and its weights are
under the MIT licence (github.com/FoundationVision/LlamaGen).
"""

import re
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from megat2i.tokenizers.vq_tokenizer import VQTokenizer
from megat2i.tokenizers.vqgan import Architecture

MIDDLE = {"0": "block_1", "1": "attn_1", "2": "block_2"}


class LlamaGenVQ(VQTokenizer):
    """See ``VQTokenizer``; ``from_checkpoint`` takes "VQ-16" or "VQ-8"."""

    kind = "llamagen-vq"
    sizes = {
        name: Architecture(128, multipliers, 2, (len(multipliers) - 1,), z_channels=256, embed_dim=8, codes=16384)
        for name, multipliers in (("VQ-16", (1, 1, 2, 2, 4)), ("VQ-8", (1, 2, 2, 4)))
    }

    @staticmethod
    def weights(tensors: dict[str, Tensor], path: str | Path, ema: bool) -> dict[str, Tensor]:
        """LlamaGen's names as the family's. Its decoder counts levels in the order of execution."""
        levels = len({name.split(".")[2] for name in tensors if name.startswith("decoder.conv_blocks.")})

        def level(found: re.Match) -> str:
            number, part = int(found[2]), found[3].replace("res", "block")
            return f"encoder.down.{number}.{part}." if found[1] == "en" else f"decoder.up.{levels - 1 - number}.{part}."

        renamed = {}
        for name, value in VQTokenizer.weights(tensors, path, ema).items():
            name = re.sub(r"^(en|de)coder\.conv_blocks\.(\d+)\.(\w+)\.", level, name)
            name = re.sub(r"(?<=coder\.mid\.)([012])(?=\.)", lambda found: MIDDLE[found[1]], name)
            renamed[name] = value
        renamed.pop("quantize.codebook_used", None)  # a statistic of its training
        return renamed

    def _vectors(self, latents: Tensor) -> Tensor:
        return F.normalize(latents, dim=-1)
