"""The preprocessing engine: captioned images in, a token store with its manifest and ledger out.

The input is cut into parts (``sources.find_parts``) that depend on the input alone; encoder processes turn each into a
small store in PREFIX.parts/ (``encode_part``). When all are there they are merged in order into PREFIX.bin and
PREFIX.idx, the ledger follows, the manifest comes last and declares the dataset complete, and the parts are removed.
So the bytes do not depend on the number of workers, a run that was killed goes on where it was, and nothing half-done
looks complete.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megat2i.data.codebook_use import CodebookUse
from megat2i.data.encode_part import Encoding, open_tokenizers
from megat2i.data.encoders import encode_parts
from megat2i.data.indexed import IndexedDataset
from megat2i.data.lengths import length_counts
from megat2i.data.manifest import Manifest
from megat2i.data.merge import ledger_lines, only_writer, write_dataset, write_ledger
from megat2i.data.samples import Part, Sample
from megat2i.data.sizes import SUSPICIOUS_MEAN
from megat2i.files import DataFileError, store_path
from megat2i.printable import printable
from megat2i.vocab import TEXT


@dataclass(frozen=True)
class Summary:
    """What a job did. ``ledger`` lists every refused sample.

    ``longest``: the name of the sample with the longest caption, looked up where captions are suspiciously long.
    """

    manifest: Manifest
    refused: int
    ledger: Path
    codebook: CodebookUse
    longest: str = ""


def preprocess(parts: Sequence[Part], prefix: Path, encoding: Encoding, workers: int, overwrite: bool) -> Summary:
    """Write the dataset ``prefix`` from ``parts`` with ``workers`` processes, or decode threads: see ``encoders``.

    An existing dataset is replaced only with ``overwrite``, and its files stay whole until the new ones are there.
    Raises DataFileError: for an existing dataset, another run on the same prefix, or inputs with nothing readable.
    """
    tokenizers = open_tokenizers(encoding)  # a bad file is one error here, not one per worker
    with only_writer(prefix, overwrite) as folder:
        prefixes = [folder / f"{number:06d}" for number in range(len(parts))]
        samples, refused, counts = 0, 0, np.zeros(tokenizers[1].codebook_size, np.int64)
        for _, encoded in encode_parts(list(zip(parts, prefixes, strict=True)), encoding, workers):
            samples, refused = samples + encoded.samples, refused + encoded.refused
            counts += encoded.codebook.counts
        ledger, codebook = store_path(prefix, ".ledger.jsonl"), CodebookUse(counts)
        if samples == refused:
            first = next(ledger_lines(prefixes), None)
            write_ledger(prefix, ledger_lines(prefixes))
        else:
            files = (encoding.text_tokenizer, encoding.image_tokenizer)
            manifest = write_dataset(prefixes, prefix, files, codebook)
            suspicious = manifest.tokens.text > SUSPICIOUS_MEAN * manifest.documents
            longest = _longest(parts, prefixes, encoding) if suspicious else ""
        for path in folder.iterdir():
            if path.name != "lock":  # only_writer removes it, and the folder, when it is closed
                path.unlink()
    if samples == refused:
        row = json.loads(first) if first else None
        problem = f"the first: {row['sample']}: {row['reason']}" if row else "they are empty"
        remedy = f"{ledger.name} lists them all"
        raise DataFileError(prefix, f"no sample of the inputs can be used; {problem}", remedy)
    return Summary(manifest, refused, ledger, codebook, longest)


def _longest(parts: Sequence[Part], prefixes: Sequence[Path], encoding: Encoding) -> str:
    """The sample with the longest caption; its part alone is read again, without its pictures."""
    lengths = [len(length_counts(IndexedDataset(prefix), TEXT)) for prefix in prefixes]
    part, text = parts[int(np.argmax(lengths))], open_tokenizers(encoding)[0]
    samples = (sample for sample in part.samples() if isinstance(sample, Sample))
    sample = max(samples, key=lambda sample: len(text.encode([sample.caption])[0]))
    return printable(f"{part.source}: {sample.name}")
