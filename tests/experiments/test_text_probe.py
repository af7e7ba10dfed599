"""Completions and the few-shot probe, on a model that was trained on a rule."""

import pytest
import torch

from megat2i.config import ModelConfig
from megat2i.data.indexed import IndexedDataset
from megat2i.data.manifest import Source
from megat2i.data.text_store import write_text_store
from megat2i.data.wordnet import Entry
from megat2i.experiments.text_probe import ANSWERS, SHOTS, Question, TextModel, questions
from megat2i.kernels import choose_ops
from megat2i.model.gpt import GPT
from megat2i.tokenizers.text import train_text_tokenizer
from megat2i.vocab import VocabLayout

CYCLE = ["red", "green", "blue"]
LINE = " ".join(CYCLE * 4) + "\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> TextModel:
    """Always goes on red, green, blue; its table has image rows too, which never get probability."""
    tokenizer = train_text_tokenizer([LINE] * 3, 270, tmp_path_factory.mktemp("text") / "tokenizer.json")
    vocab = VocabLayout(tokenizer.vocab_size, 16)
    shape = ModelConfig(hidden=32, layers=2, heads=2, ffn=64, positions="rotary")
    device, dtype = torch.device("cpu"), torch.float32
    model = GPT.empty(shape, vocab, choose_ops(device, dtype), device, dtype)
    model.initialise(0)
    ids = torch.tensor([tokenizer.encode([LINE])[0]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        model.output.weight[vocab.image_start :] = 100.0  # would win every argmax
    return TextModel(model.requires_grad_(False), tokenizer, 64, step=60)


def test_completions_follow_the_rule_and_end_with_the_line(trained):
    assert trained.complete("red green blue red green", 8).startswith("blue red green")
    assert trained.complete(LINE.removesuffix("\n"), 8) == ""


def test_the_probe_tells_right_from_wrong(trained):
    right = [Question("red green blue red", ("green", "red", "blue", "red red"))] * 2
    assert trained.answers([*right, Question("red green blue red", ("red", "green", "blue", "red red"))]) == [
        True, True, False
    ]  # fmt: skip


def test_perplexity_is_over_text_ids_alone(trained, tmp_path):
    """Image rows that would take all probability do not count; and text of the rule is easier than other text."""

    def store(name: str, lines: list[str]) -> IndexedDataset:
        write_text_store(lines, trained.tokenizer, tmp_path / name, [Source(name, len(lines), sha256="0" * 64)])
        return IndexedDataset(tmp_path / name)

    known = trained.perplexity(store("known", [LINE] * 9), 1)
    assert 2 * known < trained.perplexity(store("other", ["blue blue green\n"] * 9), 1)
    ids = torch.tensor([trained.tokenizer.encode([LINE * 9])[0][:65]])
    log_probabilities = trained.model.logits(ids[:, :-1])[0, :, : trained.tokenizer.vocab_size].log_softmax(-1)
    nll = -log_probabilities.gather(1, ids[0, 1:, None]).mean()
    assert known == pytest.approx(nll.exp().item(), rel=1e-4)


def test_a_score_is_the_mean_log_probability(trained):
    (found,) = trained.scores("red green", ["blue red"])
    before, ids = trained.tokenizer.encode(["red green", " blue red"])
    logits = trained.model.logits(torch.tensor([before + ids]))[0, :, : trained.tokenizer.vocab_size]
    expected = [logits.log_softmax(-1)[len(before) + i - 1, token].item() for i, token in enumerate(ids)]
    assert found == pytest.approx(sum(expected) / len(expected), abs=1e-5)


def test_questions_are_fixed_and_fair():
    entries = [Entry((f"word{i}",), "x", (("@", f"kind{i % 7}"),)) for i in range(80)]
    entries += [Entry(("twice",), "x", (("@", f"kind{i}"),)) for i in range(2)]  # of two meanings: neither is asked
    entries += [Entry((f"verb{i}",), "x", (("@", "kind1"),), kind="v") for i in range(80)]
    asked = questions(entries, 20)
    assert asked == questions(entries, 20) != questions(entries, 20, seed=1)
    held_out = {entry.words[0] for entry in entries if entry.held_out}
    for question in asked:
        *examples, last = question.prompt.split("\n")
        word = last.removesuffix(" is a kind of")
        assert len(examples) == SHOTS and not any(example.startswith(f"{word} ") for example in examples)
        assert question.answers[0] == f"kind{int(word.removeprefix('word')) % 7}" and word not in held_out
        assert len(set(question.answers)) == ANSWERS
