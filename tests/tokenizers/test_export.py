"""The tokenizer of an exported model: text ids stay, specials and image codes follow at the exported ids."""

import json

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from megat2i.files import DataFileError
from megat2i.tokenizers import export
from megat2i.tokenizers.text import JsonTokenizer, train_text_tokenizer
from megat2i.vocab import SPECIALS, VocabLayout

CAPTIONS = ["a red apple", "a green hut, 3 of them", "ein grünes Haus", "<|endoftext|> is text"] * 3


@pytest.fixture
def trained(tmp_path):
    return train_text_tokenizer(CAPTIONS, 300, tmp_path / "text.json")


def test_ids_are_those_of_the_exported_model(trained, tmp_path):
    vocab = VocabLayout(trained.vocab_size, 50)
    (tmp_path / "out").mkdir()
    assert "50 image codes" in export.save(trained.path, vocab, 64, tmp_path / "out")
    whole = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for caption in CAPTIONS:
        assert whole.encode(caption).ids == trained.encode([caption])[0]
        assert whole.decode(whole.encode(caption).ids) == caption
    assert [whole.token_to_id(name) for name in SPECIALS] == [vocab.special(name) for name in SPECIALS]
    text = "<doc><text>a hut</text><image><image_0><image_49></image></doc><pad>"
    special, first = vocab.special, vocab.text_tokens + 7
    assert whole.encode(text).ids == [
        special("<doc>"), special("<text>"), *trained.encode(["a hut"])[0], special("</text>"), special("<image>"),
        first, first + 49, special("</image>"), special("</doc>"), special("<pad>"),
    ]  # fmt: skip
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"], settings["model_max_length"]) == ("<doc>", "</doc>", 64)


def saved(tmp_path, tokens):
    tokenizer = Tokenizer(models.WordLevel(tokens, "a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "words.json"))
    return JsonTokenizer(tmp_path / "words.json")


def test_a_name_that_is_taken_gets_another(tmp_path):
    text = saved(tmp_path, {"a": 0, "<pad>": 1})
    export.save(text.path, VocabLayout(2, 3), 64, tmp_path)
    whole = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert (whole.token_to_id("<pad>"), whole.token_to_id("<|pad|>"), whole.token_to_id("<image_0>")) == (1, 8, 9)


def test_ids_with_a_gap_are_refused_or_right(tmp_path):
    text = saved(tmp_path, {"a": 0, "b": 7})
    vocab = VocabLayout(text.vocab_size, 3)
    try:
        export.save(text.path, vocab, 64, tmp_path)
    except DataFileError as error:
        assert "Its ids must run from 0 without a gap" in str(error)
    else:
        assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).token_to_id("<doc>") == 8


def test_a_template_of_the_text_tokenizer_is_left_out(trained, tmp_path):
    """Ours never adds tokens of its own; the exported one must not either."""
    tokenizer = Tokenizer.from_file(str(trained.path))
    tokenizer.post_processor = processors.TemplateProcessing("a $A", special_tokens=[("a", tokenizer.token_to_id("a"))])
    tokenizer.save(str(tmp_path / "template.json"))
    text = JsonTokenizer(tmp_path / "template.json")
    export.save(text.path, VocabLayout(text.vocab_size, 3), 64, tmp_path)
    whole = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert whole.encode("red").ids == text.encode(["red"])[0]


def test_a_sentencepiece_model_is_copied(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_prefix=str(tmp_path / "sp"), vocab_size=36, minloglevel=2
    )
    (tmp_path / "out").mkdir()
    line = export.save(tmp_path / "sp.model", VocabLayout(36, 3), 64, tmp_path / "out")
    assert "the text tokenizer alone" in line
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (tmp_path / "sp.model").read_bytes()
