"""The table of nearest tokens: cosines, what counts as a word, the test of two shares."""

import json
import math

import numpy as np
import pytest
import sentencepiece
import torch

from megat2i.data.indexed import IndexedDataset
from megat2i.experiments.nearest_tokens import WORD, compared, decoded, nearest, report, retrieval, use_of_ids
from megat2i.tokenizers.text import load_text_tokenizer, train_text_tokenizer


@pytest.mark.parametrize(
    ("piece", "word"),
    [(" red", True), (" été", True), ("red", False), (" re", False), (" 123", False), (" a-b", False), (" red ", False),
     ("  red", False), (" re\ufffd", False), ("", False)],
)  # fmt: skip
def test_what_counts_as_a_word(piece, word):
    assert bool(WORD.fullmatch(piece)) == word


def test_the_space_before_a_word_shows_with_every_tokenizer(tmp_path):
    captions = [f"a {colour} {thing}" for colour in ("red", "blue", "green") for thing in ("car", "cat", "house")] * 9
    json_file = train_text_tokenizer(captions, 300, tmp_path / "text.json")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_prefix=str(tmp_path / "sp"),
        vocab_size=40,
        model_type="bpe",
        minloglevel=2,
    )
    for tokenizer in (json_file, load_text_tokenizer(tmp_path / "sp.model")):
        pieces = decoded(tokenizer, tokenizer.vocab_size)
        assert len(pieces) == tokenizer.vocab_size
        (ids,) = tokenizer.encode(["a green"])
        assert "".join(pieces[token] for token in ids).strip() == "a green"
        assert " green" in pieces or " gre" in pieces
        assert sum(WORD.fullmatch(piece) is not None for piece in pieces) >= 3


def test_nearest_rows_are_those_of_the_largest_cosine():
    generator = torch.Generator().manual_seed(0)
    rows, text = torch.randn(2100, 16, generator=generator), torch.randn(50, 16, generator=generator)
    text *= torch.linspace(0.1, 30, 50)[:, None]  # lengths must not matter
    cosines, tokens = nearest(rows, text, 3)
    a, b = rows.double().numpy(), text.double().numpy()
    expected = (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    assert np.array_equal(tokens.numpy(), np.argsort(-expected, axis=1)[:, :3])
    assert np.abs(cosines.numpy() + np.sort(-expected, axis=1)[:, :3]).max() < 1e-5


def test_two_shares_are_compared_as_in_textbooks():
    found = compared({"hits": 45, "n": 100}, {"hits": 60, "n": 200}, "hits", "n")
    assert found["difference"] == pytest.approx(0.15)
    assert found["z"] == pytest.approx(0.15 / math.sqrt(0.35 * 0.65 * (1 / 100 + 1 / 200)))
    assert found["z"] == pytest.approx(2.5678, abs=1e-4) and found["p"] == pytest.approx(0.01023, abs=1e-5)
    assert found["statement"] == "45.0% against 30.0%, significant at 5% (z = 2.57, p = 0.01)"
    reverse = compared({"hits": 30, "n": 100}, {"hits": 64, "n": 200}, "hits", "n")
    assert reverse["z"] < 0 and reverse["p"] > 0.5 and "not significant" in reverse["statement"]
    assert compared({"hits": 0, "n": 9}, {"hits": 0, "n": 9}, "hits", "n")["p"] == 1.0


def test_the_report_finds_what_rows_were_made_of(run_config, tiny_store, tmp_path):
    settings = run_config(tmp_path / "run")
    tokenizer = load_text_tokenizer(tiny_store / "text.json")
    text = torch.randn(tokenizer.vocab_size, 24, generator=torch.Generator().manual_seed(0))
    pieces = decoded(tokenizer, len(text))
    word, other = pieces.index(" circle"), pieces.index("r")
    chosen = torch.tensor([word if code % 4 else other for code in range(40)])
    noise = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    found = report({"aligned": 5 * text[chosen] + 0.1 * noise, "random": noise}, text, tokenizer, settings)

    store = IndexedDataset(settings.data.train[0].prefix)
    counts = np.bincount(np.concatenate([store.sequence(n) for n in range(1, len(store), 2)]), minlength=40)
    used = np.flatnonzero(counts)
    assert np.array_equal(use_of_ids(settings)[settings.vocab_layout.image_start :][:40], counts)
    words, listed = found["word_like"], found["nearest_tokens"]["aligned"]
    assert words["aligned"]["codes"] == len(used) and words["aligned"]["word_like"] == int((used % 4 > 0).sum())
    assert words["aligned"]["distinct_tokens"] == 2 and words["aligned"]["mean_cosine"] > 0.99
    assert words["vocabulary"]["word_like"] == sum(WORD.fullmatch(piece) is not None for piece in pieces)
    assert words["random"]["share"] < 0.3 and words["tests"]["aligned against random"]["p"] < 1e-6
    assert [entry["uses"] for entry in listed] == sorted(counts[used].tolist(), reverse=True)
    for entry in listed:
        nearest_token = entry["tokens"][0]
        assert nearest_token["text"] == (" circle" if entry["code"] % 4 else "r") and len(entry["tokens"]) == 5
        assert nearest_token["cosine"] > 0.98
    circles = np.concatenate([store.sequence(n) for n in range(0, len(store), 2)])
    assert listed[0]["tokens"][0]["uses"] == (circles == pieces.index(listed[0]["tokens"][0]["text"])).sum()


def test_retrieval_is_read_from_the_last_validation(tmp_path):
    for name, rates in (("own", (0.1, 0.75)), ("control", (0.1, 0.05))):
        (tmp_path / name).mkdir()
        entries = [
            {
                "step": 1,
                "split": "valid",
                "tokens/image": 200,
                "accuracy/image": rate,
                "accuracy/text": 0.5,
                "loss": 2.0,
            }
            for rate in rates
        ]
        lines = [*entries, {"step": 2, "loss": 1.0}]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = retrieval({name: tmp_path / name for name in ("own", "control")}, batch=64)
    assert found["own"]["pictures_found_caption"] == 150 and found["control"]["pictures_found_caption"] == 10
    assert found["own"]["captions_found_picture"] == 100
    assert found["own"]["chance"] == 4 / 200  # 64, 64, 64 and 8 pairs: one right answer each
    assert found["tests"]["own against control"]["z"] > 10
