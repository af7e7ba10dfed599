"""The preprocessing engine: captioned images in, a token store with its manifest and ledger out.

The input is cut into parts (``sources.find_parts``) that depend on the input alone; encoder processes turn each into a
small store in PREFIX.parts/ (``encode_part``). When all are there they are merged in order into PREFIX.bin and
PREFIX.idx, the ledger follows, the manifest comes last and declares the dataset complete, and the parts are removed.
So the bytes do not depend on the number of workers, a run that was killed goes on where it was, and nothing half-done
looks complete.
"""

import fcntl
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megat2i.data.codebook_use import CodebookUse
from megat2i.data.encode_part import Encoding, open_tokenizers, read_refused
from megat2i.data.encoders import encode_parts
from megat2i.data.manifest import Manifest
from megat2i.data.merge import check_output, write_dataset, write_ledger
from megat2i.data.samples import Part
from megat2i.files import DataFileError, store_path


@dataclass(frozen=True)
class Summary:
    """What a job did. ``ledger`` lists every refused sample."""

    manifest: Manifest
    refused: int
    ledger: Path
    codebook: CodebookUse


def preprocess(parts: Sequence[Part], prefix: Path, encoding: Encoding, workers: int, overwrite: bool) -> Summary:
    """Write the dataset ``prefix`` from ``parts`` with ``workers`` processes, or decode threads: see ``encoders``.

    An existing dataset is replaced only with ``overwrite``, and its files stay whole until the new ones are there.
    Raises DataFileError: for an existing dataset, another run on the same prefix, or inputs with nothing readable.
    """
    check_output(prefix, overwrite)
    folder = store_path(prefix, ".parts")
    tokenizers = open_tokenizers(encoding)  # a bad file is one error here, not one per worker
    folder.mkdir(parents=True, exist_ok=True)
    with only_run(folder):
        _remove_leftovers(prefix)
        prefixes = [folder / f"{number:06d}" for number in range(len(parts))]
        samples, refused, counts = 0, 0, np.zeros(tokenizers[1].codebook_size, np.int64)
        for _, encoded in encode_parts(list(zip(parts, prefixes, strict=True)), encoding, workers):
            samples, refused = samples + encoded.samples, refused + encoded.refused
            counts += encoded.codebook.counts
        ledger, codebook = store_path(prefix, ".ledger.jsonl"), CodebookUse(counts)
        lines = (line for part, path in zip(parts, prefixes, strict=True) for line in ledger_lines(part, path))
        if samples == refused:
            first = next(lines, None)
            write_ledger(prefix, [first, *lines] if first else [])
        else:
            files = (encoding.text_tokenizer, encoding.image_tokenizer)
            manifest = write_dataset(prefixes, prefix, files, lines, codebook)
        shutil.rmtree(folder)
    if samples == refused:
        row = json.loads(first) if first else None
        problem = f"the first: {row['sample']}: {row['reason']}" if row else "they are empty"
        remedy = f"{ledger.name} lists them all"
        raise DataFileError(prefix, f"no sample of the inputs can be used; {problem}", remedy)
    return Summary(manifest, refused, ledger, codebook)


def ledger_lines(part: Part, prefix: Path) -> Iterator[bytes]:
    """Lines of the ledger: what the finished store ``prefix`` of ``part`` refused."""
    for refused in read_refused(prefix):
        yield json.dumps({"source": part.source, "sample": refused.name, "reason": refused.reason}).encode() + b"\n"


@contextmanager
def only_run(folder: Path, first: int = 0, number: int = 0) -> Iterator[None]:
    """Hold the lock of ``number`` parts (0: all) of a folder from ``first`` on.

    The system frees it when the process ends, however it ends, also on another machine.
    """
    with open(folder / "lock", "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, number, first)  # a byte for each part
        except (BlockingIOError, PermissionError) as error:
            raise DataFileError(folder, "another run is writing this dataset", "Wait for it, or stop it") from error
        except OSError as error:
            problem = f"its file system has no locks ({error.strerror})"
            raise DataFileError(folder, problem, "Mount it with them, or write to another one") from error
        yield


def _remove_leftovers(prefix: Path) -> None:
    """Temporary files of a killed run beside the dataset (those among the parts go with the parts)."""
    for suffix in (".bin", ".idx", ".json", ".ledger.jsonl", ".codebook.json"):
        for path in prefix.parent.glob(f"{prefix.name}{suffix}.*.tmp"):
            path.unlink()
