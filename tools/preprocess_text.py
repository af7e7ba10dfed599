"""Turn plain text into a token store, for ``data.mode=text_only`` and ``data.valid_text``.

    python tools/preprocess_text.py --input books/*.txt wiki.jsonl --text-tokenizer neox.json --output-prefix data/text

A ``.txt`` file is a document, and so is each line of a ``.jsonl`` file, {"text": ...}; a line break follows each. One
process: a large corpus can come from Megatron's preprocess_data.py, whose stores are trained on as they are.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megat2i.data.manifest import Source
from megat2i.data.sources import describe_source
from megat2i.data.text_store import write_text_store
from megat2i.files import DataFileError, store_path
from megat2i.printable import ArgumentParser
from megat2i.progress import count, progress
from megat2i.tokenizers.text import load_text_tokenizer


def main() -> None:
    """Write the store that the command line asks for."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", type=Path, required=True, metavar="FILE")
    parser.add_argument("--text-tokenizer", type=Path, required=True, metavar="FILE", help="of the language model")
    parser.add_argument("--output-prefix", type=Path, required=True, metavar="PREFIX")
    arguments = parser.parse_args()
    tokenizer, prefix = load_text_tokenizer(arguments.text_tokenizer), arguments.output_prefix
    index = store_path(prefix, ".idx")
    if index.exists():
        raise DataFileError(index, "there is a store already", "Remove it, or choose another prefix")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    sources: list[Source] = []
    written = write_text_store(read_documents(arguments.input, sources), tokenizer, prefix, sources)
    print(f"{prefix}: {count(written.documents, 'document')}, {written.tokens.text:,} ids of {tokenizer.vocab_size:,}")


def read_documents(paths: Sequence[Path], sources: list[Source]) -> Iterator[str]:
    """The texts of the files in their order; each file that was read joins ``sources``. Raises DataFileError."""
    for path in paths:
        number = 0
        for text in progress(_texts(path), path.name, "documents"):
            number += 1
            if text:
                yield text + "\n"
        digest, size = describe_source(str(path))
        sources.append(Source(str(path), number, digest, size))


def _texts(path: Path) -> Iterator[str]:
    if path.suffix not in (".txt", ".jsonl"):
        raise DataFileError(path, "is neither .txt nor .jsonl", "Convert it to one of these")
    where = "the file"
    try:
        with open(path, encoding="utf-8") as file:
            if path.suffix == ".txt":
                yield file.read()
                return
            for number, line in enumerate(file, 1):
                where = f"line {number}"
                if line.strip():
                    yield _text(json.loads(line))
    except (ValueError, KeyError, TypeError) as error:  # a ValueError also where it is not UTF-8
        raise DataFileError(path, f"{where}: {error!r}", 'Write {"text": "..."} a line, in UTF-8') from error


def _text(entry: dict) -> str:
    if not isinstance(entry["text"], str):
        raise TypeError("text is not a string")
    entry["text"].encode()  # a lone surrogate, which JSON can hold, is an error here and not in the tokenizer
    return entry["text"]


if __name__ == "__main__":
    try:
        main()
    except (DataFileError, OSError) as error:
        sys.exit(f"error: {error}")
