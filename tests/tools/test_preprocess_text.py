"""Plain text to a store by the command line, and what a run on text alone reads from it."""

import json
import subprocess
import sys

import pytest

from megat2i.data.indexed import IndexedDataset
from megat2i.data.manifest import Manifest
from megat2i.data.t2i_dataset import T2IDataset
from megat2i.tokenizers.text import load_text_tokenizer, train_text_tokenizer
from megat2i.vocab import VocabLayout

STORY = "The first line of a story,\nand its second: naïve café.\n"
NOTES = [f"note {number} of many" for number in range(30)]


@pytest.fixture
def corpus(tmp_path):
    train_text_tokenizer([STORY, *NOTES], 300, tmp_path / "tokenizers.json")
    (tmp_path / "story.txt").write_text(STORY)
    (tmp_path / "notes.jsonl").write_text("\n".join(json.dumps({"text": note}) for note in NOTES) + "\n\n")
    return tmp_path


def preprocess(repository, corpus, *inputs) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/preprocess_text.py", "--text-tokenizer", corpus / "tokenizers.json"]
    command += ["--output-prefix", corpus / "out/text", "--input", *(corpus / name for name in inputs)]
    return subprocess.run([str(word) for word in command], cwd=repository, capture_output=True, text=True)


def test_every_document_of_every_file(repository, corpus):
    done = preprocess(repository, corpus, "story.txt", "notes.jsonl")
    assert done.returncode == 0 and "out/text: 31 documents" in done.stdout, done.stderr
    store, manifest = IndexedDataset(corpus / "out/text"), Manifest.read(corpus / "out/text")
    tokenizer = load_text_tokenizer(corpus / "out" / manifest.text.tokenizer)
    ids = store.read(0, store.token_count).tolist()
    assert tokenizer.decode(ids) == "".join(text + "\n" for text in (STORY, *NOTES))
    assert [(source.name.rpartition("/")[2], source.samples) for source in manifest.sources] == [
        ("story.txt", 1), ("notes.jsonl", 30)
    ]  # fmt: skip
    assert manifest.sources[0].size == len(STORY.encode()) and len(manifest.sources[1].sha256) == 64
    assert len(T2IDataset(corpus / "out/text", VocabLayout(tokenizer.vocab_size, 16), 16, mode="text_only"))
    again = preprocess(repository, corpus, "story.txt")
    assert again.returncode == 1 and "text.idx: there is a store already. Remove it" in again.stderr


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", b'{"text": "good"}\n{"caption": "x"}\n', "line 2: KeyError('text')"),
        ("a.jsonl", b'{"text": 7}\n', "line 1: TypeError('text is not a string')"),
        ("a.jsonl", b'{"text": "x \\ud83d"}', "line 1: UnicodeEncodeError"),
        ("a.jsonl", b'{"text"', "line 1: JSONDecodeError"),
        ("a.txt", b"\xff\xfe\x00", "the file: UnicodeDecodeError"),
        ("a.txt", b"", "a.txt: no token"),
        ("a.csv", b"text", "a.csv: is neither .txt nor .jsonl"),
    ],
)
def test_what_is_no_text_is_one_error_and_no_store(repository, corpus, name, content, problem):
    (corpus / name).write_bytes(content)
    done = preprocess(repository, corpus, name)
    assert done.returncode == 1 and problem in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list((corpus / "out").glob("text*"))
