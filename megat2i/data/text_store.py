"""Plain text as a token store: one stream of ids without modes, which data.mode=text_only cuts into windows."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from megat2i.data.encode_part import UINT16_IDS
from megat2i.data.indexed import IndexedWriter
from megat2i.data.manifest import Manifest, Source, TextContent, TokenCounts, relative_path
from megat2i.files import DataFileError
from megat2i.tokenizers.text import TextTokenizer


def write_text_store(
    texts: Iterable[str], tokenizer: TextTokenizer, prefix: Path, sources: Sequence[Source]
) -> Manifest:
    """Write the store ``prefix``, a document for each of ``texts``, from ``sources``, which are read after the texts.

    Raises DataFileError, also where there is no token.
    """
    tokens, least, largest, documents = 0, None, None, 0
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= UINT16_IDS else np.int32)
    with IndexedWriter(prefix, dtype) as writer:
        for text in texts:
            ids = np.asarray(tokenizer.encode([text])[0], dtype=np.int64)
            if not len(ids):
                continue
            writer.add_document([ids], None)
            documents, tokens = documents + 1, tokens + len(ids)
            least = int(ids.min()) if least is None else min(least, int(ids.min()))
            largest = int(ids.max()) if largest is None else max(largest, int(ids.max()))
        if not documents:
            raise DataFileError(
                prefix, f"{', '.join(source.name for source in sources)}: no token", "Pass a text with words"
            )
    content = TextContent(
        tokenizer.vocab_size, least, largest, relative_path(tokenizer.path, prefix), tokenizer.kind, tokenizer.sha256
    )  # fmt: skip
    manifest = Manifest(
        documents=documents,
        sequences=documents,
        tokens=TokenCounts(text=tokens, image=0),
        dtype=dtype.name,
        text=content,
        image=None,
        sources=tuple(sources),
        index_sha256=writer.digests.index_sha256,
        bin_blocks=writer.digests.bin_blocks,
    )
    manifest.write(prefix)
    return manifest
