"""Vocabulary expansion: the tables of a plain language model get rows for special tokens and image codes.

Rows of text ids keep their bits. Each rule works on a whole table, whose parts tensor-parallel ranks then take.
"""

from pathlib import Path

import torch
from torch import Tensor

from megat2i.files import DataFileError
from megat2i.model.gpt import generator_of, initial_values
from megat2i.vocab import SPECIALS, VocabLayout
from megat2i.weights_file import WeightFiles

# rows of a language model that its own tokenizer leaves unused; with more of them the tokenizer is another one's
MOST_UNUSED_ROWS = 1024


def require_fit(path: Path, rows: int, vocab: VocabLayout) -> None:
    """Raises DataFileError where a table of ``rows`` cannot be that of the text tokenizer of ``vocab``."""
    if not vocab.text_tokens <= rows <= vocab.text_tokens + MOST_UNUSED_ROWS:
        raise DataFileError(
            path,
            f"has {rows:,} vocabulary rows and the data's text tokenizer {vocab.text_tokens:,} ids: they do not belong "
            "together",
            "Tokenise the data with the tokenizer of this model",
        )


def expand(name: str, table: Tensor, vocab: VocabLayout, rule: str, seed: int, file: str | None) -> Tensor:
    """The float32 table [vocab.size, D] of a run from ``table`` [rows, D] of a language model.

    ``name``: the table's; ``rule`` for new rows: ``random`` (open_lm's initial values, the same as without a
    pre-trained model and the same ``seed``), ``mean`` of the text rows, ``gaussian`` (normal, with the text rows' mean
    and standard deviation in each dimension) or ``file`` (image rows from ``file``, special rows random; so are the
    output's image rows where the file has none). Rows that no id uses keep what the language model has there, or are 0.
    """
    text, (image, image_stop) = vocab.text_tokens, vocab.ranges[1]
    specials = slice(text, text + len(SPECIALS))
    expanded = torch.zeros(vocab.size, table.shape[1])
    kept = min(len(table), vocab.text_block)
    expanded[:kept] = table[:kept]
    if rule in ("random", "file"):
        new = initial_values(name, tuple(expanded.shape), seed)
    else:
        new = _like_text(name, expanded[:text], vocab.size, rule, seed)
    expanded[specials] = new[specials]
    expanded[image:image_stop] = new[image:image_stop]
    if rule == "file" and name in (rows := WeightFiles(file)).specs:
        expanded[image:image_stop] = rows.read(name)
    return expanded


def extend(
    name: str, table: Tensor, old: VocabLayout, new: VocabLayout, rule: str | None, seed: int, file: str | None
) -> Tensor:
    """The table [new.size, D] of a run whose codebook grew: all ids keep their rows, codes beyond the old ones get new.

    ``rule`` as of ``expand``; None: 0, which is what an optimizer knows of a new row.
    """
    first, stop = old.ranges[1][1], new.ranges[1][1]
    extended = torch.zeros(new.size, table.shape[1])
    extended[:first] = table[:first]
    if rule is not None:
        extended[first:stop] = expand(name, table[: old.text_tokens], new, rule, seed, file)[first:stop]
    return extended


def require_file(path: str, names: list[str], vocab: VocabLayout, hidden: int) -> None:
    """Raises DataFileError where ``path`` lacks rows for a table of ``names``; those of the output may be absent."""
    specs = WeightFiles(path).specs
    for name in names:
        if name == "output.weight" and name not in specs:
            continue
        shape = list(specs[name].shape) if name in specs else None
        if shape != [vocab.image_codes, hidden]:
            raise DataFileError(
                path,
                f"{name} has shape {shape}, expected [{vocab.image_codes}, {hidden}]: a row for every image code",
                "Make it for this codebook and this model",
            )


def _like_text(name: str, text: Tensor, rows: int, rule: str, seed: int) -> Tensor:
    """[rows, D] after the statistics of the rows ``text``."""
    mean = text.mean(dim=0, dtype=torch.float64).float()
    if rule == "mean":
        return mean.expand(rows, -1)
    noise = torch.randn(rows, text.shape[1], generator=generator_of(name, seed))
    return mean + noise * text.std(dim=0)
