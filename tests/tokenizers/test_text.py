"""Text tokenizers: lossless where they promise it, blind to special tokens in captions, refused when broken."""

import json
import subprocess
import sys
import unicodedata

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from megat2i.files import DataFileError
from megat2i.tokenizers.growth import growth
from megat2i.tokenizers.text import UnencodableText, load_text_tokenizer, train_text_tokenizer

CAPTIONS = [
    f"a {colour} {thing}, {n} of them" for colour in ("red", "blue") for thing in ("car", "cat") for n in range(9)
]
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_text_tokenizer(CAPTIONS, 300, tmp_path_factory.mktemp("text") / "text_tokenizer.json")


@pytest.fixture(scope="module")
def neox(shared_data):
    return load_text_tokenizer(shared_data / "gpt-neox-20b-tokenizer.json")


@pytest.fixture(scope="module")
def plain_neox(shared_data):
    tokenizer = tokenizers.Tokenizer.from_file(str(shared_data / "gpt-neox-20b-tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return tokenizer


@given(UNICODE)
def test_trained_tokenizer_is_lossless_on_normalised_text(trained, text):
    text = unicodedata.normalize("NFC", text)
    (ids,) = trained.encode([text])
    assert trained.decode(ids) == text
    assert all(0 <= i < trained.vocab_size for i in ids)


@given(UNICODE | st.sampled_from(["<|endoftext|>", "x<|padding|> y", "   \n\n\t  ", "🇫🇷 👩🏽\u200d🚒"]))
def test_neox_is_lossless_on_normalised_text(neox, text):
    text = unicodedata.normalize("NFC", text)
    (ids,) = neox.encode([text])
    assert neox.decode(ids) == text
    assert all(0 <= i < 50_277 for i in ids)


@given(UNICODE | st.sampled_from(["<|endoftext|> a", "   \n\n\t  ", "🇫🇷 👩🏽\u200d🚒", "don't I'LL 12,345.6"]))
def test_neox_has_the_ids_of_the_librarys_plain_encoding(neox, plain_neox, text):
    assert neox.encode([text, "x", text]) == [
        plain_neox.encode(t, add_special_tokens=False).ids for t in (text, "x", text)
    ]


def test_text_that_is_not_normalised_comes_back_normalised(trained):
    decomposed = "cafe\u0301"
    assert trained.decode(trained.encode([decomposed])[0]) == "caf\u00e9" != decomposed


def test_neox_has_its_published_ids(neox):
    assert (neox.vocab_size, neox.kind) == (50_277, "tokenizers")
    assert neox.encode(["hello world"]) == [[25521, 1533]]


def test_a_special_token_in_a_caption_is_ordinary_text(neox):
    (ids,) = neox.encode(["<|endoftext|>"])
    assert 0 not in ids and len(ids) > 1
    assert neox.decode([0]) == "<|endoftext|>"  # the control: id 0 is that token


def test_training_is_deterministic_across_processes(trained, tmp_path):
    program = (
        "import sys; from megat2i.tokenizers.text import train_text_tokenizer;"
        "train_text_tokenizer(sys.argv[2:], 300, sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "again.json", *CAPTIONS], check=True)
    assert load_text_tokenizer(tmp_path / "again.json").sha256 == trained.sha256
    other = train_text_tokenizer(CAPTIONS[:-9], 300, tmp_path / "other.json")
    assert other.sha256 != trained.sha256


def test_training_merges_what_is_common(trained):
    assert 256 < trained.vocab_size <= 300
    assert len(trained.encode(["a red car"])[0]) < len("a red car")


def test_a_vocabulary_smaller_than_the_bytes_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 256"):
        train_text_tokenizer(CAPTIONS, 255, tmp_path / "t.json")
    assert not list(tmp_path.iterdir())


def test_sentencepiece_model(tmp_path):
    (tmp_path / "corpus.txt").write_text("\n".join(CAPTIONS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "sp"), vocab_size=29, minloglevel=2
    )
    tokenizer = load_text_tokenizer(tmp_path / "sp.model")
    assert (tokenizer.kind, tokenizer.vocab_size) == ("sentencepiece", 29)
    ids = tokenizer.encode(CAPTIONS)
    assert [tokenizer.decode(i) for i in ids] == CAPTIONS
    assert all(0 <= i < 29 for sequence in ids for i in sequence)
    (control,) = tokenizer.encode(["</s>"])
    assert tokenizer.decode([2]) == "" and 2 not in control  # id 2 is </s>, which text never reaches


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.json", b'{"model": 1}', "not a tokenizer"),
        ("a.json", b"\xff", "not a tokenizer"),
        ("a.model", b"nonsense", "not a SentencePiece model"),
        ("a.model", b"", "not a SentencePiece model"),
        ("a.txt", b"", "not known from the ending '.txt'"),
        ("a.json", None, "No such file"),
    ],
)
def test_a_bad_file_is_one_error_that_names_it(tmp_path, name, content, problem):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataFileError, match=problem) as error:
        load_text_tokenizer(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def changed(trained, path, change):
    """A tokenizer file that is the trained one after ``change``."""
    settings = json.loads(trained.path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))
    return path


def replace(content, **pattern):
    return {"type": "Replace", "pattern": pattern or {"String": "a"}, "content": content}


@pytest.mark.parametrize(
    "normalizer",
    [
        replace("a" * 10_000_000),
        replace("a" * 100, Regex=""),
        {"type": "Sequence", "normalizers": [replace("aa")] * 30},
        {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [replace("a" * 9)] * 2}] * 2},
        {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 1000},
    ],
    ids=["long", "empty match", "doubling", "nested", "many"],
)
def test_a_normalizer_that_makes_text_much_longer_is_refused(trained, tmp_path, normalizer):
    path = changed(trained, tmp_path / "t.json", lambda settings: settings.update(normalizer=normalizer))
    with pytest.raises(DataFileError, match="its normalizer can make a text more than 64 times as long"):
        load_text_tokenizer(path)


def test_normalizers_in_use_are_taken():
    llama = [{"type": "Prepend", "prepend": "\u2581"}, replace("\u2581", String=" ")]
    t5 = [{"type": "Precompiled"}, replace("\u2581", Regex=" {2,}")]
    assert growth({"type": "Sequence", "normalizers": llama}) == 1
    assert growth({"type": "Sequence", "normalizers": t5}) == 2


def test_a_panic_of_the_library_is_a_text_that_cannot_be_encoded(trained, tmp_path):
    def backtracking(settings):
        pattern = {"Regex": "(x+x+)+y"}
        settings["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}

    tokenizer = load_text_tokenizer(changed(trained, tmp_path / "t.json", backtracking))
    with pytest.raises(UnencodableText, match="the tokenizer fails on it"):
        tokenizer.encode(["x" * 60])
    assert tokenizer.encode(["red"])[0], "and goes on"


def test_an_id_of_billions_is_refused(trained, tmp_path):
    path = changed(trained, tmp_path / "t.json", lambda settings: settings["model"]["vocab"].update(zz=4 * 10**9))
    with pytest.raises(DataFileError, match="its largest id is 4,000,000,000"):
        load_text_tokenizer(path)
