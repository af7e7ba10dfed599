"""Which text tokens lie nearest to image codes, whether more of them are words than chance gives, and retrieval.

The image rows are looked at as they were aligned, as the control's (trained on shuffled captions) and as the random
ones from which both started.
"""

import json
import math
import re
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from megat2i.config import Config
from megat2i.data.t2i_dataset import T2IDataset
from megat2i.tokenizers.text import TextTokenizer

PAIRS_COUNTED = 10_000  # first pairs of every training dataset, over which uses of ids are counted
SHOWN, NEAREST = 256, 5  # most used codes that are listed; tokens listed of each
WORD = re.compile(r" [^\W\d_]{3,}")
DEFINITION = "a text token is word-like where it decodes to a space and three or more letters, and to nothing else"
NOTE = "codes count as independent; those that share a token are not, so the true p is this or larger"
SIGNIFICANT = 0.05


def report(tables: dict[str, Tensor], text: Tensor, tokenizer: TextTokenizer, settings: Config) -> dict:
    """Nearest text tokens of the codes that the data uses, by name of the ``tables`` [codes, D] of image rows.

    ``text`` [tokens, D]: the embeddings of the tokens. The first table is tested against the others.
    """
    uses = use_of_ids(settings)
    code_uses = uses[settings.vocab_layout.image_start :][: settings.vocab_layout.image_codes]
    by_use = code_uses.argsort(descending=True, stable=True)[: int((code_uses > 0).sum())]
    pieces = decoded(tokenizer, len(text))
    is_word = torch.tensor([WORD.fullmatch(piece) is not None for piece in pieces])
    words = {
        "definition": DEFINITION,
        "vocabulary": {"tokens": len(text), "word_like": int(is_word.sum()), "share": is_word.float().mean().item()},
    }
    listed = {}
    for name, rows in tables.items():
        cosines, tokens = nearest(rows[by_use], text, NEAREST)
        first, hits = tokens[:, 0], int(is_word[tokens[:, 0]].sum())
        words[name] = {"codes": len(first), "word_like": hits, "share": hits / len(first)}
        words[name] |= {"distinct_tokens": len(first.unique()), "mean_cosine": cosines[:, 0].mean().item()}
        listed[name] = [
            {
                "code": code,
                "uses": int(code_uses[code]),
                "tokens": [
                    {"text": pieces[token], "cosine": round(cosine, 4), "uses": int(uses[token])}
                    for token, cosine in zip(tokens[place].tolist(), cosines[place].tolist(), strict=True)
                ],
            }
            for place, code in enumerate(by_use[:SHOWN].tolist())
        ]
    own, *others = tables
    words["tests"] = {
        f"{own} against {name}": compared(words[own], words[name], "word_like", "codes") for name in others
    }
    return {"word_like": words | {"note": NOTE}, "nearest_tokens": listed}


def retrieval(folders: dict[str, Path], batch: int) -> dict:
    """How many held-out pictures find their caption, and the reverse, among at most ``batch``; of finished runs."""
    result = {}
    for name, folder in folders.items():
        entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        last = [entry for entry in entries if entry.get("split") == "valid"][-1]
        pairs = last["tokens/image"]
        found = {kind: round(last[f"accuracy/{kind}"] * pairs) for kind in ("image", "text")}
        result[name] = {"pairs": pairs, "loss": last["loss"], "chance": math.ceil(pairs / batch) / pairs}
        result[name] |= {"pictures_found_caption": found["image"], "captions_found_picture": found["text"]}
    own, *others = folders
    hits = "pictures_found_caption"
    tests = {f"{own} against {name}": compared(result[own], result[name], hits, "pairs") for name in others}
    return result | {"tests": tests}


def use_of_ids(settings: Config) -> Tensor:
    """How often each id [vocab.size] occurs in the training data."""
    vocab, data = settings.vocab_layout, settings.data
    uses = torch.zeros(vocab.size, dtype=torch.int64)
    for source in data.train:
        dataset = T2IDataset(source.prefix, vocab, data.sequence_length)
        for row in range(min(PAIRS_COUNTED, len(dataset))):
            uses += torch.bincount(torch.from_numpy(dataset.row(row, None).tokens), minlength=vocab.size)
    return uses


def decoded(tokenizer: TextTokenizer, count: int) -> list[str]:
    """The text of each id behind another token, where the space that begins a word shows."""
    (anchor,) = tokenizer.encode(["a"])
    before = len(tokenizer.decode(anchor))
    return [tokenizer.decode([*anchor, token])[before:] for token in range(count)]


def nearest(rows: Tensor, text: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cosines and numbers [codes, count] of the rows of ``text`` nearest to each of ``rows``, nearest first."""
    text = F.normalize(text)
    found = [(F.normalize(part) @ text.T).topk(count) for part in rows.split(1024)]  # bounds the memory of cosines
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def compared(one: dict, other: dict, hits: str, of: str) -> dict:
    """Two shares ``hits`` / ``of``: difference, z of the pooled two-proportion test, two-sided p, and a sentence."""
    difference = one[hits] / one[of] - other[hits] / other[of]
    pooled = (one[hits] + other[hits]) / (one[of] + other[of])
    deviation = math.sqrt(pooled * (1 - pooled) * (1 / one[of] + 1 / other[of]))
    z = difference / deviation if deviation else 0.0
    p = math.erfc(abs(z) / math.sqrt(2))
    verdict = f"{'significant' if p < SIGNIFICANT else 'not significant'} at {SIGNIFICANT:.0%}"
    shares = f"{one[hits] / one[of]:.1%} against {other[hits] / other[of]:.1%}"
    return {"difference": difference, "z": z, "p": p, "statement": f"{shares}, {verdict} (z = {z:.2f}, p = {p:.2g})"}
