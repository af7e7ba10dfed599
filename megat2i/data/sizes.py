"""What a configuration leaves to its data: the sizes of the vocabulary, and how long a row is."""

import dataclasses
import os
from pathlib import Path

from megat2i.config import Config, ConfigError, DataConfig
from megat2i.data.indexed import IndexedDataset
from megat2i.data.lengths import length_counts
from megat2i.data.manifest import Manifest
from megat2i.data.t2i_dataset import LAYOUTS
from megat2i.files import DataFileError, store_path
from megat2i.vocab import IMAGE, TEXT

SUSPICIOUS_MEAN = 512  # ids of a caption; real ones have 10 to 150
LENGTH_MULTIPLE = 8  # that a row's length is rounded up to: parallel.sequence divides it among 2, 4 or 8 ranks
SPECIALS = sum(len(part) for part in LAYOUTS["text_to_image"] if not isinstance(part, int))
SUFFIXES = (".bin", ".idx", ".json")


def with_data_sizes(settings: Config) -> Config:
    """The settings with ``vocab`` and ``data.sequence_length``, where these were left out, as the data have them.

    Raises DataFileError where data that must say it are missing or do not, ConfigError for text without images, whose
    rows have no length of their own.
    """
    left_out = (settings.vocab.text_tokens, settings.vocab.image_codes, settings.data.sequence_length)
    if settings.data.train and None in left_out:
        require_stores(settings.data)
        settings = with_vocabulary(settings)
        _require_vocabulary(settings)
        if settings.data.sequence_length is None:
            data = dataclasses.replace(settings.data, sequence_length=sequence_length(settings.data))
            settings = dataclasses.replace(settings, data=data)
    return settings


def with_vocabulary(settings: Config) -> Config:
    """The settings with the vocabulary sizes that the first dataset's manifest has, where these were left out."""
    manifest = Manifest.read(settings.data.train[0].prefix) if settings.data.train else None
    text, image = (manifest.text, manifest.image) if manifest else (None, None)
    vocab = settings.vocab
    if vocab.text_tokens is None and text:
        vocab = dataclasses.replace(vocab, text_tokens=text.vocab_size)
    if vocab.image_codes is None and image:
        vocab = dataclasses.replace(vocab, image_codes=image.codebook_size)
    return dataclasses.replace(settings, vocab=vocab)


def require_stores(data: DataConfig) -> None:
    """Raises DataFileError where a dataset of the configuration is not there, naming its key and its file."""
    keys = {f"data.train[{number}].prefix": dataset.prefix for number, dataset in enumerate(data.train)}
    keys |= {f"data.{name}": getattr(data, name) for name in ("valid", "valid_text") if getattr(data, name)}
    for key, prefix in keys.items():
        index = store_path(prefix, ".idx")
        if index.exists():
            continue
        remedy = f"Set {key} to the PREFIX of PREFIX.idx, as --output-prefix of tools/preprocess_data.py had it"
        if prefix.endswith(SUFFIXES):
            remedy = f"{key} takes it without the ending: {os.path.splitext(prefix)[0]}"
        elif not Path(prefix).is_absolute():
            remedy += f"; it is looked for from {Path.cwd()}"
        raise DataFileError(index, f"not found: no dataset is named {prefix}", remedy)


def _require_vocabulary(settings: Config) -> None:
    """Raises DataFileError where no manifest says the size of the vocabulary that was left out."""
    path = store_path(settings.data.train[0].prefix, ".json")
    for key in ("text_tokens", "image_codes"):
        if getattr(settings.vocab, key) is not None:
            continue
        if not path.exists():
            problem, remedy = "not found", f"It says vocab.{key}: put it back beside the data, or set vocab.{key}"
        else:
            what = "captions" if key == "text_tokens" else "images"
            problem, remedy = f"says nothing of vocab.{key}", f"Set it, to 1 where the data have no {what}"
        raise DataFileError(path, problem, remedy)


def sequence_length(data: DataConfig) -> int:
    """Positions of a row that holds every caption in full with its image, rounded up to LENGTH_MULTIPLE.

    Of the training data and the validation data together. Raises ConfigError for text without images.
    """
    if data.mode == "text_only":
        raise ConfigError(
            "data.sequence_length is not set: a text without images has no length of its own; set it, e.g. to 1024"
        )
    prefixes = [dataset.prefix for dataset in data.train] + ([data.valid] if data.valid else [])
    return rounded_up(max(longest_row(IndexedDataset(prefix), data.mode) for prefix in prefixes))


def rounded_up(positions: int) -> int:
    """The length of rows that are to hold ``positions``."""
    return -(-positions // LENGTH_MULTIPLE) * LENGTH_MULTIPLE


def longest_row(store: IndexedDataset, mode: str = "text_to_image") -> int:
    """Image codes + longest caption + special tokens of a store; captions count in mode "text_to_image" alone."""
    if store.modes is None or not len(store):
        raise DataFileError(store.index_path, f"it has no modes, which {mode} needs", "Use data.mode=text_only")
    longest = {kind: max(0, len(length_counts(store, kind)) - 1) for kind in (TEXT, IMAGE)}
    return sum(longest[part] if isinstance(part, int) else len(part) for part in LAYOUTS[mode])


def captions_in_words(manifest: Manifest, longest: str = "") -> list[str]:
    """What to tell of the captions of a dataset: their lengths, the row that holds them, and what looks wrong.

    ``longest``: the name of the longest one, where it is known.
    """
    text, captions, (rows, columns) = manifest.text, manifest.text.captions, manifest.image.grid
    row = rows * columns + SPECIALS
    all_fit, most_fit = rounded_up(row + captions.longest), rounded_up(row + captions.percentile_99)
    lines = [
        f"captions: half of them have at most {captions.median:,} ids, 99% at most {captions.percentile_99:,}, the "
        f"longest {captions.longest:,}",
        f"data.sequence_length, where it is left out: {all_fit:,} ({rows * columns:,} image codes + {SPECIALS} special "
        f"tokens + {captions.longest:,}, rounded up)"
        + (f"; {most_fit:,} cuts at most 1%" if most_fit < all_fit else ""),
    ]
    mean = manifest.tokens.text / manifest.documents
    if mean > SUSPICIOUS_MEAN:
        where = f", that of {longest}" if longest else ""
        lines.append(
            f"warning: a mean of {mean:,.0f} ids is far above what a caption has, and the longest has "
            f"{captions.longest:,}{where}: is every text the caption of its picture?"
        )
    if text.unknown:
        lines.append(
            f"warning: {text.unknown:,} of {manifest.tokens.text:,} text ids stand for letters that the tokenizer does "
            "not know: the model cannot tell them apart; use a tokenizer with byte fallback"
        )
    return lines
