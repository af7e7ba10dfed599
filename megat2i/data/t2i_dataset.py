"""One document, one training row: ``<doc><text> caption </text><image> codes </image></doc>``, padded to one length.

Stores hold raw text ids and raw image codes. Specials, padding and the shift of the codes into the unified vocabulary
are added here, so that one store serves every vocabulary layout, the image-only run and the text-only run.
"""

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megat2i.data.indexed import IndexedDataset
from megat2i.files import DataFileError, store_path
from megat2i.vocab import IGNORE, IMAGE, SPECIAL, TEXT, VocabLayout

# A row in order: groups of specials, and the modalities whose stored sequences stand between them.
LAYOUTS = {
    "text_to_image": (("<doc>", "<text>"), TEXT, ("</text>", "<image>"), IMAGE, ("</image>", "</doc>")),
    "image_only": (("<doc>", "<image>"), IMAGE, ("</image>", "</doc>")),
    "text_only": (("<doc>", "<text>"), TEXT, ("</text>", "</doc>")),
}
CHECK_DOCUMENTS = 1 << 17  # documents per step of the check at opening: bounds its memory


@dataclass(frozen=True)
class Row:
    """One row of S = ``sequence_length`` positions.

    tokens: int64[S], ids of the unified vocabulary. labels: int64[S], ``labels[t] = tokens[t + 1]``; IGNORE at the last
    position and before padding. modality: int8[S], TEXT, IMAGE or SPECIAL of the label; -1 where it is ignored.
    text_cut: number of caption tokens that did not fit.
    """

    tokens: np.ndarray
    labels: np.ndarray
    modality: np.ndarray
    text_cut: int


def require_same_tokenizers(datasets: list["T2IDataset"]) -> None:
    """Raise DataFileError where ids of two datasets mean different things, as far as their manifests say."""
    first: dict[str, tuple[T2IDataset, tuple]] = {}
    for dataset in datasets:
        manifest = dataset.store.manifest
        if manifest is None:
            continue
        meanings = {}
        if manifest.text and TEXT in dataset.modalities:
            meanings["text tokenizer"] = (manifest.text.sha256,)
        if manifest.image and IMAGE in dataset.modalities:
            meanings["image tokenizer, grid or crop"] = (
                manifest.image.sha256, manifest.image.grid, manifest.image.crop
            )  # fmt: skip
        for what, meaning in meanings.items():
            other, expected = first.setdefault(what, (dataset, meaning))
            if meaning != expected:
                path = store_path(dataset.store.prefix, ".json")
                problem = f"its {what} differs from that of {other.store.prefix}: the same ids mean something else"
                raise DataFileError(path, problem, "Make all datasets of a run with the same tokenizers and crop")


class T2IDataset:
    """The rows of a token store; ``len()`` is their number.

    mode: "text_to_image" (caption and image), "image_only" or "text_only". A store without modes (Megatron text) has no
    documents in this sense: "text_only" then cuts its flat stream of tokens into windows of S + 1 that begin every S
    tokens, without specials; tokens after the last whole window are not used.
    caption_dropout: probability of an empty caption, decided by (seed, epoch, sample) alone.

    Raises DataFileError where the store is damaged, made for another vocabulary, or does not fit ``sequence_length``.
    """

    def __init__(
        self,
        prefix: str | Path,
        vocab: VocabLayout,
        sequence_length: int,
        mode: str = "text_to_image",
        caption_dropout: float = 0.0,
        seed: int = 0,
    ):
        if mode not in LAYOUTS:
            raise ValueError(f"data.mode is {mode!r}, expected one of {', '.join(LAYOUTS)}")
        if not 0.0 <= caption_dropout <= 1.0 or (caption_dropout and mode != "text_to_image"):
            raise ValueError(f"data.caption_dropout is {caption_dropout} with mode {mode}: 0 to 1, text_to_image only")
        if not 0 <= seed < 2**63:
            raise ValueError(f"data seed {seed} is not a whole number from 0 to 2^63 - 1")
        if sequence_length < 1:
            raise ValueError(f"data.sequence_length is {sequence_length}, expected at least 1")
        self.store = IndexedDataset(prefix)
        self.vocab, self.sequence_length, self.mode = vocab, sequence_length, mode
        self.caption_dropout, self.seed = caption_dropout, seed
        self.pad = vocab.special("<pad>")
        self._layout = [
            part if isinstance(part, int) else np.array([vocab.special(name) for name in part])
            for part in LAYOUTS[mode]
        ]
        self._specials = sum(len(part) for part in LAYOUTS[mode] if not isinstance(part, int))
        self.modalities = [part for part in LAYOUTS[mode] if isinstance(part, int)]
        # Of each modality: one past its largest raw id, and what turns a raw id into one of the unified vocabulary.
        self._limit = {TEXT: vocab.text_tokens, IMAGE: vocab.image_codes}
        self._shift = {TEXT: 0, IMAGE: vocab.image_start}
        # Read as unsigned, a negative id is larger than every limit: one comparison instead of two.
        self._unsigned = np.dtype(f"<u{self.store.dtype.itemsize}")
        self._check_vocabulary()
        self._pattern = self._check_documents()
        if self._pattern:
            if sequence_length <= self._specials:
                raise ValueError(f"data.sequence_length is {sequence_length}; the specials alone take {self._specials}")
            self._check_images()
            self._rows = self.store.number_of_documents
        else:
            self._rows = max(0, self.store.token_count - 1) // sequence_length

    def __len__(self) -> int:
        return self._rows

    @property
    def cut_captions(self) -> int:
        """How many captions are longer than a row has room for and lose their end."""
        if not self._pattern or TEXT not in self.modalities:
            return 0
        return int((self._lengths() > self.sequence_length).sum())

    @property
    def longest_row(self) -> int:
        """Positions of the longest row before it is cut; of windows, those that it has."""
        return int(self._lengths().max()) if self._pattern else self.sequence_length

    @property
    def mean_labels(self) -> float:
        """Positions with a label of an average row, captions in full."""
        if not self._pattern:
            return float(self.sequence_length)
        return float(np.minimum(self._lengths(), self.sequence_length).mean()) - 1  # the first token is no label

    def _lengths(self) -> np.ndarray:
        """Tokens of every row before it is cut."""
        sequences = [self.store.lengths[self._pattern.index(kind) :: len(self._pattern)] for kind in self.modalities]
        return sum(lengths.astype(np.int64) for lengths in sequences) + self._specials

    def byte_offsets(self, rows: np.ndarray) -> np.ndarray:
        """Where in the .bin the ``rows`` (numbers [n]) begin, int64 [n]."""
        if self._pattern:
            return self.store.byte_offsets(rows * len(self._pattern))
        return rows * (self.sequence_length * self.store.dtype.itemsize)

    def row(self, sample: int, epoch: int | None) -> Row:
        """Row number ``sample`` in the order of the file. An ``epoch`` of None means evaluation: no caption is dropped.

        Raises DataFileError where a stored id is outside the vocabulary.
        """
        tokens, labels, modality = self.blank_rows(1)
        text_cut = self.fill(sample, epoch, tokens[0], labels[0], modality[0])
        return Row(tokens[0], labels[0], modality[0], text_cut)

    def blank_rows(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, labels and modality [count, S] of rows that are padding only: <pad>, IGNORE and -1."""
        shape = (count, self.sequence_length)
        return np.full(shape, self.pad, np.int64), np.full(shape, IGNORE, np.int64), np.full(shape, -1, np.int8)

    def fill(self, sample: int, epoch: int | None, tokens: np.ndarray, labels: np.ndarray, modality: np.ndarray) -> int:
        """Write the row into one blank row of a batch (three arrays [S], as in Row); returns its ``text_cut``."""
        if not 0 <= sample < self._rows:
            raise IndexError(f"{self.store.prefix}: row {sample} of {self._rows}")
        if not self._pattern:
            self._fill_window(sample, tokens, labels, modality)
            return 0
        first = sample * len(self._pattern)
        stored, raw = self.store.sequences(first, len(self._pattern)), {}
        for kind in self.modalities:
            place = self._pattern.index(kind)
            raw[kind] = self._check_ids(stored[place], kind, "sequence", first + place)
        text_cut = 0
        if TEXT in raw:
            room = self.sequence_length - self._specials - (len(raw[IMAGE]) if IMAGE in raw else 0)
            if epoch is not None and self._drops_caption(sample, epoch):
                room = 0
            else:
                text_cut = max(0, len(raw[TEXT]) - room)
            raw[TEXT] = raw[TEXT][:room]
        modality[: self._specials + sum(map(len, raw.values())) - 1] = SPECIAL
        end = 0
        for part in self._layout:
            start = end
            if isinstance(part, int):
                end += len(raw[part])
                part_of_row = tokens[start:end]
                part_of_row[:] = raw[part]
                if self._shift[part]:
                    part_of_row += self._shift[part]
                modality[start - 1 : end - 1] = part  # a token is the label of the position before it
            else:
                end += len(part)
                tokens[start:end] = part
        labels[: end - 1] = tokens[1:end]
        return text_cut

    def _fill_window(self, sample: int, tokens: np.ndarray, labels: np.ndarray, modality: np.ndarray) -> None:
        """Window of S + 1 consecutive tokens of a store without modes: every one but the first is a label."""
        start = sample * self.sequence_length
        ids = self._check_ids(self.store.read(start, self.sequence_length + 1), TEXT, "window", sample)
        tokens[:], labels[:], modality[:] = ids[:-1], ids[1:], TEXT

    def _check_ids(self, ids: np.ndarray, modality: int, unit: str, number: int) -> np.ndarray:
        """``ids`` themselves, where all are ids of ``modality``; ``unit`` and ``number`` name them in the error."""
        if ids.size and np.maximum.reduce(ids.view(self._unsigned)) >= self._limit[modality]:
            name, limit = ("image codes", "image_codes") if modality == IMAGE else ("text ids", "text_tokens")
            problem = f"{unit} {number} has {name} from {ids.min()} to {ids.max()}"
            remedy = f"vocab.{limit} is {self._limit[modality]}: set the vocabulary that the store was made with"
            raise DataFileError(self.store.bin_path, problem, remedy)
        return ids

    def _drops_caption(self, sample: int, epoch: int) -> bool:
        if not self.caption_dropout:
            return False
        digest = hashlib.blake2b(struct.pack("<3q", self.seed, epoch, sample), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self.caption_dropout * 2**64

    def _check_vocabulary(self) -> None:
        """The manifest names the sizes that the ids were made with; ids of another size would mean something else."""
        manifest, path = self.store.manifest, store_path(self.store.prefix, ".json")
        if manifest is None:
            return
        for content, field, key, expected in (
            (manifest.text, "vocab_size", "text_tokens", self.vocab.text_tokens),
            (manifest.image, "codebook_size", "image_codes", self.vocab.image_codes),
        ):
            if content is not None and getattr(content, field) != expected:
                problem = f"{field} is {getattr(content, field)}, vocab.{key} of this run is {expected}"
                remedy = f"Leave vocab.{key} out, or use the store of the tokenizer that it belongs to"
                raise DataFileError(path, problem, remedy)

    def _check_documents(self) -> tuple[int, ...]:
        """The modes of the sequences of a document, the same for all documents; () for a store without modes."""
        store = self.store
        if not len(store):
            self._refuse("it holds no sequence", "Check how it was made")
        if store.modes is None:
            if self.mode != "text_only":
                self._refuse(f"it has no modes, which {self.mode} needs", "Use data.mode text_only or another store")
            if store.token_count <= self.sequence_length:
                problem = f"{store.token_count} tokens are no window of {self.sequence_length} + 1"
                self._refuse(problem, "Shorten data.sequence_length or use a larger store")
            return ()
        pattern = tuple(int(mode) for mode in store.modes[: store.documents[1]])
        if pattern not in ((TEXT, IMAGE), (TEXT,), (IMAGE,)):
            self._refuse(
                f"document 0 has sequences of modes {pattern}", "Expected one text (0), one image (1), or both"
            )
        if not set(self.modalities) <= set(pattern):
            problem = f"its documents have sequences of modes {pattern}, {self.mode} needs {tuple(self.modalities)}"
            self._refuse(problem, "Use another data.mode or another store")
        for start in range(0, store.number_of_documents, CHECK_DOCUMENTS):
            stop = min(start + CHECK_DOCUMENTS, store.number_of_documents)
            bounds = np.arange(start, stop + 1) * len(pattern)
            wrong = store.documents[start + 1 : stop + 1] != bounds[1:]
            if not wrong.any():
                wrong = (store.modes[bounds[0] : bounds[-1]].reshape(-1, len(pattern)) != pattern).any(axis=1)
            if wrong.any():
                problem = f"document {start + int(wrong.argmax())} does not have sequences of modes {pattern}"
                self._refuse(problem, "Every document must be made as the first one is")
            store.release()
        return pattern

    def _check_images(self) -> None:
        """Every image sequence that a row holds has codes, fits it and, with a manifest, fills the grid."""
        if IMAGE not in self.modalities:
            return
        lengths = self.store.lengths[self._pattern.index(IMAGE) :: len(self._pattern)]
        shortest, longest = int(lengths[0]), int(lengths[0])
        for start in range(0, len(lengths), CHECK_DOCUMENTS):
            some = lengths[start : start + CHECK_DOCUMENTS]
            shortest, longest = min(shortest, int(some.min())), max(longest, int(some.max()))
            self.store.release()
        if shortest < 1 or longest + self._specials > self.sequence_length:
            problem = f"images have {shortest} to {longest} codes; {self._specials} specials are added to a row"
            given = f"Every image needs codes, and data.sequence_length ({self.sequence_length}) room for it"
            self._refuse(
                problem, f"{given}: {self.longest_row} holds all rows in full; left out, it is taken from them"
            )
        image = self.store.manifest and self.store.manifest.image
        if image is not None and not shortest == longest == image.grid[0] * image.grid[1]:
            problem = f"images have {shortest} to {longest} codes, the manifest's grid is {image.grid}"
            self._refuse(problem, "Build the store again")

    def _refuse(self, problem: str, remedy: str):
        raise DataFileError(self.store.index_path, problem, remedy)
