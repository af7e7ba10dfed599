"""How often a dataset uses each of its image codes: counted from its tokens, kept in PREFIX.codebook.json."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megat2i.data.indexed import IndexedDataset
from megat2i.files import DataFileError, store_path
from megat2i.vocab import IMAGE

SEQUENCES = 2048  # looked at together: bounds the memory


@dataclass(frozen=True)
class CodebookUse:
    """``counts``: how often each code occurs, int64 [codes]."""

    counts: np.ndarray

    @classmethod
    def of_store(cls, store: IndexedDataset, codebook_size: int) -> "CodebookUse":
        """Counted from the tokens of a store whose codes are all below ``codebook_size``."""
        counts = np.zeros(codebook_size, np.int64)
        for tokens, image in token_blocks(store):
            counts += np.bincount(tokens[image], minlength=codebook_size)
        return cls(counts)

    @classmethod
    def read(cls, prefix: Path, codebook_size: int) -> "CodebookUse | None":
        """The content of PREFIX.codebook.json; None where there is no such file. Raises DataFileError."""
        path = store_path(prefix, ".codebook.json")
        try:
            counts = np.array(json.loads(path.read_bytes())["counts"], np.int64)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise DataFileError(path, f"not a report of codebook use ({error!r})", "Remove it") from error
        if counts.shape != (codebook_size,):
            raise DataFileError(path, f"{counts.size} counts, the codebook has {codebook_size} codes", "Remove it")
        return cls(counts)

    @property
    def used(self) -> int:
        """Codes that occur at all."""
        return int(np.count_nonzero(self.counts))

    @property
    def perplexity(self) -> float:
        """exp of the entropy of the codes' frequencies: as many codes, used evenly, would be as hard to guess."""
        share = self.counts[self.counts > 0] / self.counts.sum()
        return float(np.exp(-(share * np.log(share)).sum()))

    def content(self) -> bytes:
        """A JSON object of one line."""
        fields = {"codebook_size": len(self.counts), "used": self.used, "perplexity": round(self.perplexity, 3)}
        return json.dumps({**fields, "counts": self.counts.tolist()}).encode() + b"\n"

    def __str__(self) -> str:
        return f"{self.used:,} of {len(self.counts):,} codes occur, perplexity {self.perplexity:,.0f}"


def token_blocks(store: IndexedDataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All tokens of ``store`` in blocks of some sequences: (tokens, which of them are image codes as bool)."""
    at = 0
    for start in range(0, len(store), SEQUENCES):
        lengths = store.lengths[start : start + SEQUENCES]
        tokens = store.read(at, int(lengths.sum(dtype=np.int64)))
        modes = np.zeros(len(lengths), np.int8) if store.modes is None else store.modes[start : start + SEQUENCES]
        yield tokens, np.repeat(modes == IMAGE, lengths)
        at += len(tokens)
