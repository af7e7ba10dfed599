"""Plain text as a store, and what a text-only run reads from it."""

import numpy as np
import pytest

from megat2i.data.manifest import Manifest, Source
from megat2i.data.t2i_dataset import T2IDataset
from megat2i.data.text_store import write_text_store
from megat2i.files import DataFileError
from megat2i.tokenizers.text import train_text_tokenizer
from megat2i.vocab import VocabLayout

LINES = [f"the number {number} is a kind of number\n" for number in range(50)]


@pytest.fixture
def tokenizer(tmp_path):
    return train_text_tokenizer(LINES, 300, tmp_path / "text_tokenizer.json")


def test_windows_hold_the_stream(tokenizer, tmp_path):
    written = write_text_store([*LINES, ""], tokenizer, tmp_path / "text", [Source("numbers", 51, sha256="0" * 64)])
    stream = np.array([token for line in LINES for token in tokenizer.encode([line])[0]])
    dataset = T2IDataset(tmp_path / "text", VocabLayout(tokenizer.vocab_size, 16), 16, mode="text_only")
    assert len(dataset) == (len(stream) - 1) // 16
    row = dataset.row(3, 0)
    assert row.tokens.tolist() == stream[48:64].tolist() and row.labels.tolist() == stream[49:65].tolist()
    assert Manifest.read(tmp_path / "text") == written
    assert (written.documents, written.tokens.text, written.tokens.image) == (50, len(stream), 0)
    assert (written.text.min_id, written.text.max_id) == (stream.min(), stream.max())
    written.verify(tmp_path / "text")


def test_no_text_is_refused(tokenizer, tmp_path):
    with pytest.raises(DataFileError, match="nothing: no token"):
        write_text_store(["", ""], tokenizer, tmp_path / "text", [Source("nothing", 2, sha256="0" * 64)])
    assert not (tmp_path / "text.bin").exists()
