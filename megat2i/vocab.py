"""The unified vocabulary: which ids are text, which are special, which are image codes.

Text ids come first and keep the tokenizer's own numbers, the seven specials follow them, and image code ``c`` is id
``image_start + c``. Both blocks of the table are padded to a multiple of 256 rows, so that no shape depends on the
tensor-parallel size and every block is tile-aligned for the kernels. With GPT-NeoX's 50,277 tokens and MoVQGAN's
16,384 codes this gives open_lm's own 50,432 rows plus 16,384: 66,816 (Zhang et al. 2024, section 2.1).
"""

from dataclasses import dataclass

import numpy as np

SPECIALS = ("<doc>", "</doc>", "<text>", "</text>", "<image>", "</image>", "<pad>")
BLOCK_ALIGNMENT = 256

# Modality codes. TEXT and IMAGE equal the modes that the token files store for a sequence.
TEXT, IMAGE, SPECIAL = 0, 1, 2
MODALITIES = ("text", "image", "special")
IGNORE = -100  # a label that takes no part in the loss (PyTorch's convention)


def _aligned(rows: int) -> int:
    return -(-rows // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT


@dataclass(frozen=True)
class VocabLayout:
    """Ranges of ids for a text tokenizer of ``text_tokens`` entries and an image codebook of ``image_codes``."""

    text_tokens: int
    image_codes: int

    def __post_init__(self):
        for field in ("text_tokens", "image_codes"):
            if getattr(self, field) < 1:
                raise ValueError(f"vocab.{field} must be at least 1, got {getattr(self, field)}")

    @property
    def text_block(self) -> int:
        """Rows of the first block: text, specials and unused padding."""
        return _aligned(self.text_tokens + len(SPECIALS))

    @property
    def image_start(self) -> int:
        """Id of image code 0."""
        return self.text_block

    @property
    def size(self) -> int:
        """Rows of the embedding and output tables."""
        return self.text_block + _aligned(self.image_codes)

    @property
    def ranges(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(start, end) of the ids that may receive probability: text with the specials, and image codes."""
        return (
            (0, self.text_tokens + len(SPECIALS)),
            (self.image_start, self.image_start + self.image_codes),
        )

    @property
    def blocks(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(start, end) of the two blocks of the table that tensor parallelism stripes."""
        return ((0, self.text_block), (self.text_block, self.size))

    def special(self, name: str) -> int:
        """Id of a special token, e.g. ``special("<image>")``."""
        return self.text_tokens + SPECIALS.index(name)

    def modality(self, ids: np.ndarray) -> np.ndarray:
        """Modality code (int8) of every id; -1 for ids in no range, IGNORE included."""
        ids = np.asarray(ids)
        modality = np.full(ids.shape, -1, dtype=np.int8)
        modality[(ids >= 0) & (ids < self.text_tokens)] = TEXT
        modality[(ids >= self.text_tokens) & (ids < self.text_tokens + len(SPECIALS))] = SPECIAL
        modality[(ids >= self.image_start) & (ids < self.image_start + self.image_codes)] = IMAGE
        return modality
