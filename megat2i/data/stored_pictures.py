"""Documents of a dataset as people see them: the caption, and the picture that its codes stand for."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from megat2i.data.indexed import IndexedDataset
from megat2i.data.manifest import Manifest
from megat2i.files import DataFileError
from megat2i.tokenizers.image import load_image_tokenizer
from megat2i.tokenizers.text import load_text_tokenizer


def stored_pictures(
    prefix: Path, documents: Iterable[int], text_tokenizer: Path | None = None, image_tokenizer: Path | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """(caption, picture uint8 [3, H, W]) of each document; tokenizers where they are not where the manifest says.

    Raises DataFileError.
    """
    manifest = Manifest.read(prefix)
    text = load_text_tokenizer(text_tokenizer or prefix.parent / manifest.text.tokenizer)
    image_path = image_tokenizer or prefix.parent / manifest.image.tokenizer
    image = load_image_tokenizer(image_path)
    if image.grid != manifest.image.grid:
        problem = f"its grid is {image.grid}, the manifest of {prefix} says {manifest.image.grid}"
        raise DataFileError(image_path, problem, "Write the dataset again")
    store = IndexedDataset(prefix)
    for document in documents:
        caption, codes = (store.sequence(sequence) for sequence in store.document(document))
        picture = image.decode(torch.from_numpy(codes.astype(np.int64))[None])[0]
        yield text.decode(caption.tolist()), picture.cpu().numpy()
