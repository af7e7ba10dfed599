"""Text tokenizers: a JSON file of the ``tokenizers`` library, a SentencePiece model, or one trained on captions.

Captions come from strangers, so text is only ever text: "<|endoftext|>" inside a caption is encoded as those letters,
never as the special token of that name, and no tokenizer adds tokens of its own.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megat2i.files import DataFileError, PendingFile, commit
from megat2i.tokenizers.growth import MAXIMUM_GROWTH, growth

MAXIMUM_IDS = 1 << 24  # of a vocabulary: a model has a row for each
BYTES = 256  # the least vocabulary of a byte-level tokenizer


class UnencodableText(ValueError):
    """A text on which a tokenizer fails; the message says how."""


class TextTokenizer(Protocol):
    """What the data and generation code need of a text tokenizer; ids are 0 .. ``vocab_size`` - 1."""

    kind: str
    path: Path
    sha256: str  # of the file, hexadecimal
    vocab_size: int
    unknown_id: int | None  # of what is not in the vocabulary; None where every byte has an id

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens. Raises UnencodableText."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``."""


class JsonTokenizer:
    """A tokenizer of the ``tokenizers`` library, e.g. GPT-NeoX's (50,277 ids).

    A byte-level one is lossless on text in the Unicode normal form that it asks for (NFC for GPT-NeoX and for those
    trained here): decode(encode(text)) == text.
    """

    kind = "tokenizers"

    def __init__(self, path: str | Path):
        self.path = Path(path)
        content = _read(self.path)
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            _require_bounded_growth(self.path, content)
            with _panics_as_errors():
                self._tokenizer = Tokenizer.from_buffer(content)
        except DataFileError:
            raise
        # What the library raises for bad JSON and for a bad model alike, and Python's JSON reader for a nested one.
        except (ValueError, RecursionError) as error:
            remedy = "Pass a tokenizer.json written by the Hugging Face tokenizers library"
            raise DataFileError(self.path, f"not a tokenizer of the tokenizers library ({error})", remedy) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # True: special tokens found in a text are split like any text
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if self.vocab_size == 0:
            raise DataFileError(self.path, "a tokenizer without a vocabulary", "Train it first")
        if self.vocab_size > MAXIMUM_IDS:
            problem = f"its largest id is {self.vocab_size - 1:,}, and a model has a row for each up to {MAXIMUM_IDS:,}"
            raise DataFileError(self.path, problem, "Number its tokens from 0 without large gaps")
        unknown = getattr(self._tokenizer.model, "unk_token", None)  # a Unigram model has it by id, inside
        self.unknown_id = None if unknown is None else self._tokenizer.token_to_id(unknown)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        # Batches of one: a larger one would keep every core busy in each of our worker processes.
        # Fast: without the place of each token in the text, which nobody asks for here; a seventh faster.
        encode = self._tokenizer.encode_batch_fast
        with _panics_as_errors():
            return [encode([text], add_special_tokens=False)[0].ids for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    """UnencodableText where the library's Rust code panics: an error that has no class to be named, and no base class.

    Such an error would end a job as a Ctrl-C does.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise UnencodableText(f"the tokenizer fails on it ({str(error)[:200]})") from error


def _require_bounded_growth(path: Path, content: bytes) -> None:
    settings = json.loads(content)
    if not isinstance(settings, dict):
        return
    if growth(settings.get("normalizer")) * growth(settings.get("pre_tokenizer")) > MAXIMUM_GROWTH:
        problem = f"its normalizer can make a text more than {MAXIMUM_GROWTH} times as long"
        raise DataFileError(path, problem, "Pass a tokenizer from a source that you trust")


class SentencePieceTokenizer:
    """A SentencePiece model. It is not lossless: the model's own normaliser (NFKC as a rule) is applied."""

    kind = "sentencepiece"

    def __init__(self, path: str | Path):
        self.path = Path(path)
        content = _read(self.path)
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(content)
        except RuntimeError as error:
            remedy = "Pass a .model file written by SentencePiece's trainer"
            raise DataFileError(self.path, "not a SentencePiece model", remedy) from error
        self.vocab_size = self._model.vocab_size()
        unknown = self._model.unk_id()
        bytes_known = any(self._model.is_byte(number) for number in range(self.vocab_size))
        self.unknown_id = None if bytes_known or unknown < 0 else unknown

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts), num_threads=1)

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode([int(i) for i in ids])


def load_text_tokenizer(path: str | Path) -> TextTokenizer:
    """The tokenizer in ``path``: .json by the ``tokenizers`` library, .model by SentencePiece. Raises DataFileError."""
    kinds = {".json": JsonTokenizer, ".model": SentencePieceTokenizer}
    suffix = Path(path).suffix
    if suffix not in kinds:
        remedy = "Pass a .json file (tokenizers library) or a .model file (SentencePiece)"
        raise DataFileError(path, f"the kind of text tokenizer is not known from the ending {suffix!r}", remedy)
    return kinds[suffix](path)


def train_text_tokenizer(texts: Iterable[str], vocab_size: int, path: str | Path) -> TextTokenizer:
    """Train a byte-level BPE of at most ``vocab_size`` ids (256 bytes, then merges) on ``texts``; write it to ``path``.

    The same texts give the same file. A small corpus may offer fewer merges than asked for.
    """
    if vocab_size < BYTES:
        raise ValueError(f"a byte-level vocabulary has at least {BYTES} entries, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    file = PendingFile(Path(path))
    try:
        file.write(tokenizer.to_str(pretty=True).encode())
        commit([file])
    finally:
        file.discard()
    return JsonTokenizer(path)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataFileError(path, f"cannot be read ({error.strerror})", "Check the tokenizer's path") from error
