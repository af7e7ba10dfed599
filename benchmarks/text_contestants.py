"""Captions to token files in one process: ours, and megatron-core's ``IndexedDatasetBuilder`` in the loop of its tool.

All read the same JSON lines with the same tokenizer and must write the same bytes. Megatron's side goes a line at a
time: parse, tokenize, ``add_document``; ``finalize`` at the end. It runs with the tokenizer that its tool uses
(transformers, in the quicker of its two ways) and with the bare ``tokenizers`` library. Ours also checks every id,
takes digests, writes the manifest and flushes to the disk.
"""

import importlib.util
import json
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import emoji
import numpy as np
from tokenizers import Tokenizer

from megat2i.data.indexed import IndexedWriter
from megat2i.data.manifest import Source
from megat2i.data.text_store import write_text_store
from megat2i.tokenizers.text import load_text_tokenizer

FILLERS = ("a photo of {}", "a drawing of {} on a white background", "{}, in the style of an icon", "we see {}")


def emoji_captions(count: int) -> Iterator[str]:
    """English captions of about 30 tokens out of the names of emoji; always the same."""
    names = sorted({entry["en"].strip(":").replace("_", " ") for entry in emoji.EMOJI_DATA.values()})
    chance = random.Random(0)
    for _ in range(count):
        things = chance.sample(names, chance.randint(2, 6))
        yield chance.choice(FILLERS).format(", ".join(things[:-1]) + " and " + things[-1])


def write_lines(path: Path, captions: Iterable[str]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": caption}) + "\n" for caption in captions)


def contestants(lines: Path, tokenizer: Path) -> dict[str, Callable[[Path], None]]:
    """What writes the token file of ``lines`` under a prefix; tokenizers are loaded here, once."""
    text = load_text_tokenizer(tokenizer)

    def ours(prefix: Path) -> None:
        with open(lines, encoding="utf-8") as file:
            captions = (json.loads(line)["text"] for line in file)
            write_text_store(captions, text, prefix, Source(lines.name, 0, size=lines.stat().st_size))

    systems: dict[str, Callable[[Path], None]] = {"ours": ours}
    if (megatron := _megatron()) is None:
        print("megatron-core is not installed: its rows are left out")
        return systems
    dtype = np.uint16 if text.vocab_size < 2**16 else np.int32

    def loop(encode: Callable[[str], list[int]], prefix: Path) -> None:
        builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        with open(lines, encoding="utf-8") as file:
            for line in file:
                if ids := encode(json.loads(line)["text"]):
                    builder.add_document(ids, [len(ids)])
        builder.finalize(f"{prefix}.idx")

    bare = Tokenizer.from_file(str(tokenizer))
    systems["Megatron, tokenizers"] = lambda prefix: loop(lambda caption: bare.encode(caption).ids, prefix)
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed: Megatron's row with it is left out")
        return systems
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer))
    systems["Megatron, transformers"] = lambda prefix: loop(lambda caption: fast(caption)["input_ids"], prefix)
    return systems


def finalisers(sequences: int, folder: Path) -> Iterator[dict[str, Callable[[], None]]]:
    """Again and again, for each system, a writer with ``sequences`` documents of 1 to 60 tokens, ready to be finalised.

    Their counts are put in place directly: the time of adding them is in the captions' rows.
    """
    lengths = np.random.default_rng(0).integers(1, 61, sequences, dtype=np.int32)
    bounds = np.arange(1, sequences + 1)
    megatron = _megatron()
    while True:
        writer = IndexedWriter(folder / "ours", np.uint16).__enter__()
        writer._index.lengths.write(lengths.astype("<i4"))
        writer._index.documents.write(bounds.astype("<i8"))
        ready = {"ours": lambda writer=writer: writer.__exit__(None, None, None)}
        if megatron is not None:
            builder = megatron.IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=np.uint16)
            builder.sequence_lengths = lengths.tolist()
            builder.document_indices = [0, *bounds.tolist()]
            ready["Megatron"] = lambda builder=builder: builder.finalize(str(folder / "theirs.idx"))
        yield ready


def check_equal(prefixes: list[Path], suffixes: tuple[str, ...]) -> None:
    """Raise where the files of two systems differ."""
    for suffix in suffixes:
        files = [Path(f"{prefix}{suffix}") for prefix in prefixes]
        if any(file.read_bytes() != files[0].read_bytes() for file in files[1:]):
            raise RuntimeError(f"the systems wrote different {suffix} files: {', '.join(map(str, files))}")


def _megatron():
    """megatron-core's module of the format, or None where it is not installed."""
    if importlib.util.find_spec("megatron") is None:
        return None
    with warnings.catch_warnings(action="ignore"):  # of parts that are not used here
        import megatron.core.datasets.indexed_dataset as module
    return module
