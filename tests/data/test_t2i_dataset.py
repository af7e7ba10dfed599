"""Row assembly: every position of a row, captions cut and dropped, and stores that do not fit refused."""

from dataclasses import replace as changed

import numpy as np
import pytest

from megat2i.data.indexed import IndexedWriter
from megat2i.data.manifest import Manifest
from megat2i.data.t2i_dataset import T2IDataset, require_same_tokenizers
from megat2i.files import DataFileError
from megat2i.vocab import IGNORE, IMAGE, SPECIAL, TEXT, VocabLayout

VOCAB = VocabLayout(300, 64)  # <doc> is 300, <pad> 306; image code c is 512 + c
DOC, END_DOC, START_TEXT, END_TEXT, START_IMAGE, END_IMAGE, PAD = range(300, 307)


def write(prefix, documents, modes=(0, 1), dtype=np.uint16):
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document([np.asarray(tokens, np.int64) for tokens in document], modes)
    return prefix


def slow_row(ids: list[int], length: int):
    """Labels and modality from the tokens alone, by the definition, one position at a time."""
    tokens = ids + [PAD] * (length - len(ids))
    labels = [*tokens[1:], IGNORE]
    labels = [IGNORE if label == PAD else label for label in labels]
    return tokens, labels, VOCAB.modality(np.array(labels)).tolist()


def check(row, ids: list[int]) -> None:
    tokens, labels, modality = slow_row(ids, len(row.tokens))
    assert row.tokens.tolist() == tokens
    assert row.labels.tolist() == labels
    assert row.modality.tolist() == modality
    assert (row.tokens.dtype, row.labels.dtype, row.modality.dtype) == (np.int64, np.int64, np.int8)


def test_row_position_by_position(tmp_path):
    dataset = T2IDataset(write(tmp_path / "s", [([7, 299], [0, 63, 5])]), VOCAB, 13)
    row = dataset.row(0, 0)
    assert row.tokens.tolist() == [300, 302, 7, 299, 303, 304, 512, 575, 517, 305, 301, 306, 306]
    assert row.labels.tolist() == [302, 7, 299, 303, 304, 512, 575, 517, 305, 301, -100, -100, -100]
    assert row.modality.tolist() == [2, 0, 0, 2, 2, 1, 1, 1, 2, 2, -1, -1, -1]
    assert row.text_cut == 0 and len(dataset) == 1
    check(row, [300, 302, 7, 299, 303, 304, 512, 575, 517, 305, 301])  # and the definition says the same
    with pytest.raises(AssertionError):  # control: labels that are not shifted
        row.labels[:-1] = row.labels[1:].copy()
        check(row, [300, 302, 7, 299, 303, 304, 512, 575, 517, 305, 301])


@pytest.mark.parametrize("length", [14, 15, 20, 23, 30])
def test_all_rows_equal_the_definition(tmp_path, store, pairs, length):
    """From no room for the caption at all (14 = 8 codes + 6 specials) to padding after every row."""
    dataset = T2IDataset(store, VOCAB, length)
    assert len(dataset) == len(pairs)
    for sample, (text, image) in enumerate(pairs):
        row = dataset.row(sample, 0)
        kept = text[: length - 14].tolist()
        check(row, [DOC, START_TEXT, *kept, END_TEXT, START_IMAGE, *(image + 512).tolist(), END_IMAGE, END_DOC])
        assert row.text_cut == max(0, len(text) - (length - 14))
        # Counts of labels per modality: every token of the row but the first is predicted once.
        assert np.bincount(row.modality + 1, minlength=4)[1:].tolist() == [len(kept), 8, 5]
    assert sum(dataset.row(i, 0).text_cut > 0 for i in range(len(pairs))) == sum(len(t) > length - 14 for t, _ in pairs)


def test_image_only_and_text_only(store, pairs):
    images, texts = T2IDataset(store, VOCAB, 20, "image_only"), T2IDataset(store, VOCAB, 9, "text_only")
    for sample, (text, image) in enumerate(pairs):
        check(images.row(sample, 0), [DOC, START_IMAGE, *(image + 512).tolist(), END_IMAGE, END_DOC])
        check(texts.row(sample, 0), [DOC, START_TEXT, *text[:5].tolist(), END_TEXT, END_DOC])
        assert texts.row(sample, 0).text_cut == max(0, len(text) - 5)


def test_stores_of_one_modality(tmp_path):
    texts = write(tmp_path / "t", [([1, 2],), ([3],)], modes=(TEXT,))
    check(T2IDataset(texts, VOCAB, 7, "text_only").row(1, 0), [DOC, START_TEXT, 3, END_TEXT, END_DOC])
    images = write(tmp_path / "i", [([1, 2],), ([3, 4],)], modes=(IMAGE,))
    row = T2IDataset(images, VOCAB, 7, "image_only").row(1, 0)
    check(row, [DOC, START_IMAGE, 515, 516, END_IMAGE, END_DOC])
    assert set(row.modality.tolist()) == {SPECIAL, IMAGE, -1}
    with pytest.raises(DataFileError, match=r"modes \(0,\), text_to_image needs \(0, 1\)"):
        T2IDataset(texts, VOCAB, 20)


def test_text_without_modes_is_cut_into_windows(tmp_path, write_without_modes):
    stream = np.random.default_rng(0).integers(0, 300, 53)
    dataset = T2IDataset(write_without_modes(tmp_path / "m", stream, [30, 0, 23]), VOCAB, 10, "text_only")
    assert len(dataset) == 5
    rows = [dataset.row(sample, 0) for sample in range(5)]
    assert np.array_equal(np.concatenate([row.tokens for row in rows]), stream[:50])
    assert np.array_equal(np.concatenate([row.labels for row in rows]), stream[1:51])  # each is a label once
    assert all((row.modality == TEXT).all() and row.text_cut == 0 for row in rows)
    assert len(T2IDataset(tmp_path / "m", VOCAB, 52, "text_only")) == 1
    with pytest.raises(DataFileError, match=r"53 tokens are no window of 53 \+ 1"):
        T2IDataset(tmp_path / "m", VOCAB, 53, "text_only")
    with pytest.raises(DataFileError, match="no modes, which text_to_image needs"):
        T2IDataset(tmp_path / "m", VOCAB, 10)
    with pytest.raises(IndexError):
        dataset.row(5, 0)


def test_caption_dropout(store, pairs):
    """Decided by (seed, epoch, sample) alone, as often as asked, never in evaluation."""
    dropped = {}
    for seed in (0, 1):
        dataset = T2IDataset(store, VOCAB, 30, caption_dropout=0.3, seed=seed)
        again = T2IDataset(store, VOCAB, 25, caption_dropout=0.3, seed=seed)
        for epoch in range(60):
            for sample, (text, image) in enumerate(pairs):
                row, captioned = dataset.row(sample, epoch), text.tolist()
                is_dropped = row.tokens[2] == END_TEXT and len(text) > 0
                if is_dropped:
                    captioned = []
                    assert row.text_cut == 0
                check(row, [DOC, START_TEXT, *captioned, END_TEXT, START_IMAGE, *(image + 512), END_IMAGE, END_DOC])
                if len(text):
                    dropped[seed, epoch, sample] = is_dropped
                    assert (again.row(sample, epoch).tokens[2] == END_TEXT) == is_dropped
        assert not any(dataset.row(i, None).tokens[2] == END_TEXT for i in range(23) if len(pairs[i][0]))
    share, count = np.mean(list(dropped.values())), len(dropped)
    assert abs(share - 0.3) < 4 * np.sqrt(0.3 * 0.7 / count)
    for part in range(3):  # each of seed, epoch and sample matters
        assert len({tuple(v for key, v in dropped.items() if key[part] == value) for value in (0, 1)}) == 2


def test_extreme_dropout(store, pairs):
    always, never = T2IDataset(store, VOCAB, 30, caption_dropout=1.0), T2IDataset(store, VOCAB, 30)
    for sample, (text, _) in enumerate(pairs):
        assert always.row(sample, 5).tokens[2] == END_TEXT
        assert never.row(sample, 5).tokens[2 : 2 + len(text)].tolist() == text.tolist()


@pytest.mark.parametrize(
    ("document", "dtype", "message"),
    [
        (([300], [1]), np.uint16, "sequence 2 has text ids from 300 to 300. vocab.text_tokens is 300"),
        (([1], [5, 64]), np.uint16, "sequence 3 has image codes from 5 to 64. vocab.image_codes is 64"),
        (([1], [65_535, 3]), np.uint16, "sequence 3 has image codes"),
        (([-1, 3], [1]), np.int32, "sequence 2 has text ids from -1 to 3"),
        (([3], [-(2**31)]), np.int32, "sequence 3 has image codes"),
        (([2**62], [1]), np.int64, "sequence 2 has text ids"),
    ],
)
def test_ids_outside_the_vocabulary(tmp_path, document, dtype, message):
    dataset = T2IDataset(write(tmp_path / "s", [([299], [63]), document], dtype=dtype), VOCAB, 12)
    dataset.row(0, 0)  # control: the largest ids are inside
    with pytest.raises(DataFileError, match=rf"s\.bin: {message}"):
        dataset.row(1, 0)


def test_windows_check_their_ids(tmp_path, write_without_modes):
    prefix = write_without_modes(tmp_path / "m", [1, 2, 3, 4, 300, 5, 6], [7], "<i4")
    dataset = T2IDataset(prefix, VOCAB, 3, "text_only")
    dataset.row(0, 0)
    with pytest.raises(DataFileError, match="window 1 has text ids from 4 to 300"):
        dataset.row(1, 0)


def test_stores_that_do_not_fit_are_refused(tmp_path):
    good = ([1], [2, 3])
    write(tmp_path / "good", [good, good])
    T2IDataset(tmp_path / "good", VOCAB, 8)  # control
    with pytest.raises(DataFileError, match="images have 2 to 2 codes; 6 specials"):
        T2IDataset(tmp_path / "good", VOCAB, 7)
    with pytest.raises(DataFileError, match="images have 0 to 2 codes"):
        T2IDataset(write(tmp_path / "none", [good, ([1], [])]), VOCAB, 9)
    with pytest.raises(DataFileError, match="it holds no sequence"):
        T2IDataset(write(tmp_path / "empty", []), VOCAB, 9)
    for name, modes in (("swapped", (1, 0)), ("texts", (0, 0))):
        with pytest.raises(DataFileError, match="document 0 has sequences of modes"):
            T2IDataset(write(tmp_path / name, [good], modes=modes), VOCAB, 9)
    for name, odd, modes in (("odd", good, (1, 0)), ("three", (*good, [4]), (0, 1, 1)), ("one", good[:1], (0,))):
        with IndexedWriter(tmp_path / name, np.uint16) as writer:
            writer.add_document([np.array(tokens) for tokens in good], (0, 1))
            writer.add_document([np.array(tokens) for tokens in odd], modes)
            writer.add_document([np.array(tokens) for tokens in good], (0, 1))
        with pytest.raises(DataFileError, match=rf"{name}\.idx: document 1 does not have"):
            T2IDataset(tmp_path / name, VOCAB, 9)


def test_another_vocabulary_is_refused(store_with_manifest, tmp_path, write_store, pairs):
    T2IDataset(store_with_manifest, VOCAB, 30)  # control
    for vocab, message in (
        (VocabLayout(301, 64), r"manifest\.json: vocab_size is 300, vocab.text_tokens of this run is 301"),
        (VocabLayout(300, 128), r"manifest\.json: codebook_size is 64, vocab.image_codes of this run is 128"),
    ):
        with pytest.raises(DataFileError, match=message):
            T2IDataset(store_with_manifest, vocab, 30)
    images = T2IDataset(store_with_manifest, VOCAB, 30).store.manifest.image
    write_store(tmp_path / "grid", pairs, manifest=True, image=type(images)(**{**vars(images), "grid": (3, 3)}))
    with pytest.raises(DataFileError, match=r"images have 8 to 8 codes, the manifest's grid is \(3, 3\)"):
        T2IDataset(tmp_path / "grid", VOCAB, 30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "both"}, "data.mode is 'both'"),
        ({"caption_dropout": 1.5}, "data.caption_dropout is 1.5"),
        ({"caption_dropout": 0.1, "mode": "image_only"}, "text_to_image only"),
        ({"sequence_length": 4, "mode": "text_only"}, "the specials alone take 4"),
        ({"sequence_length": 0}, "data.sequence_length is 0"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_bad_arguments(store, arguments, message):
    with pytest.raises(ValueError, match=message):
        T2IDataset(**{"prefix": store, "vocab": VOCAB, "sequence_length": 30, **arguments})


def test_datasets_whose_ids_mean_different_things_are_refused(tmp_path, write_store, make_documents):
    """Same vocabulary sizes, another codebook or crop: nothing else would notice."""
    documents = make_documents(4, 0)
    write_store(tmp_path / "a", documents, manifest=True)
    write_store(tmp_path / "b", documents, manifest=True)
    manifest = Manifest.read(tmp_path / "a")
    write_store(tmp_path / "codebook", documents, manifest=True, image=changed(manifest.image, sha256="ef"))
    write_store(tmp_path / "crop", documents, manifest=True, image=changed(manifest.image, crop="pad"))
    write_store(tmp_path / "words", documents, manifest=True, text=changed(manifest.text, sha256="01"))

    def datasets(*names, mode="text_to_image"):
        return [T2IDataset(tmp_path / name, VOCAB, 40, mode=mode) for name in names]

    require_same_tokenizers(datasets("a", "b"))
    for other in ("codebook", "crop"):
        with pytest.raises(DataFileError, match="image tokenizer, grid or crop differs"):
            require_same_tokenizers(datasets("a", other))
    with pytest.raises(DataFileError, match="text tokenizer differs"):
        require_same_tokenizers(datasets("a", "b", "words"))
    require_same_tokenizers(datasets("a", "words", mode="image_only"))  # their texts take no part
