"""Lengths of captions: counted from the index, kept in the manifest, told by the tools."""

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from captioned_images import caption, make_encoding, run, tool, write_images
from conftest import make_documents, write_store

from megat2i.data import lengths
from megat2i.data.encode_part import Encoding
from megat2i.data.indexed import IndexedDataset, IndexedWriter
from megat2i.data.lengths import caption_lengths, length_counts
from megat2i.data.manifest import CaptionLengths, Manifest
from megat2i.data.sizes import captions_in_words
from megat2i.data.t2i_dataset import T2IDataset
from megat2i.files import DataFileError
from megat2i.vocab import IMAGE, TEXT, VocabLayout


def test_lengths_are_those_of_the_captions(tmp_path, monkeypatch):
    monkeypatch.setattr(lengths, "SEQUENCES", 6)  # several pieces
    documents = make_documents(50)
    write_store(tmp_path / "a", documents)
    store = IndexedDataset(tmp_path / "a")
    texts = np.array([len(text) for text, _ in documents])
    assert length_counts(store, TEXT).tolist() == np.bincount(texts).tolist()
    assert length_counts(store, IMAGE).tolist() == [0] * 8 + [50]
    ordered = np.sort(texts)
    assert caption_lengths(store) == CaptionLengths(ordered[24], ordered[49], texts.max())


def test_older_manifests_lack_the_lengths_and_stay_readable(tmp_path):
    documents = make_documents(3)
    write_store(tmp_path / "a", documents, manifest=True)
    path = tmp_path / "a.json"
    content = json.loads(path.read_text())
    for name in ("captions", "unknown"):
        del content["text"][name]
    del content["sha256"]
    content["format_version"] = 1
    path.write_text(json.dumps(content))
    assert Manifest.read(tmp_path / "a").text.captions is None
    content["text"]["capitals"] = 3
    path.write_text(json.dumps(content))
    with pytest.raises(DataFileError, match=r"fields \['capitals'\] of text are missing or unknown"):
        Manifest.read(tmp_path / "a")


def test_the_tool_says_what_a_row_needs(tmp_path):
    encoding = make_encoding(tmp_path)
    source = write_images(tmp_path / "in", 200)
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    rows[7]["caption"] = caption(7) * 8
    source.write_text("\n".join(map(json.dumps, rows)))
    done = tool(
        "--input", source, "--output-prefix", tmp_path / "data/train", "--workers", 1,
        "--text-tokenizer", encoding.text_tokenizer, "--image-tokenizer", encoding.image_tokenizer,
    )  # fmt: skip
    captions = Manifest.read(tmp_path / "data/train").text.captions
    assert captions.longest > 3 * captions.percentile_99 >= captions.median > 0
    needed = -(-(4 + 6 + captions.longest) // 8) * 8
    assert f"99% at most {captions.percentile_99}, the longest {captions.longest}\n" in done.stdout
    assert f"data.sequence_length, where it is left out: {needed} (4 image codes + 6 special tokens" in done.stdout
    assert "warning" not in done.stdout
    vocab = VocabLayout(Manifest.read(tmp_path / "data/train").text.vocab_size, 40)
    assert T2IDataset(tmp_path / "data/train", vocab, needed).cut_captions == 0
    fewer = T2IDataset(tmp_path / "data/train", vocab, -(-(10 + captions.percentile_99) // 8) * 8)
    assert fewer.cut_captions == 1 and "; " + str(fewer.sequence_length) + " cuts at most 1%" in done.stdout


def test_suspiciously_long_captions_are_pointed_at_by_name(tmp_path):
    encoding = make_encoding(tmp_path)
    source = write_images(tmp_path / "in", 5)
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["caption"] = "word salad " * (400 if number == 3 else 300)
    source.write_text("\n".join(map(json.dumps, rows)))
    summary = run(source, tmp_path / "data/train", encoding)
    warning = captions_in_words(summary.manifest, summary.longest)[-1]
    assert warning.startswith("warning: a mean of ") and "line 4: 0003.png: is every text the caption" in warning


def test_unknown_letters_are_counted(tmp_path):
    encoding = make_encoding(tmp_path)
    source = write_images(tmp_path / "in", 6)
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    rows[0]["caption"] = "picture 你好 number"
    source.write_text("\n".join(map(json.dumps, rows)))
    counts = {}
    for fallback in (False, True):
        texts = iter([caption(number) for number in range(200)])
        model = tmp_path / f"{fallback}.model"
        with open(model, "wb") as file:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=texts, model_writer=file, vocab_size=320 if fallback else 40, model_type="bpe",
                byte_fallback=fallback, hard_vocab_limit=False, minloglevel=2,
            )  # fmt: skip
        text = Encoding(model, encoding.image_tokenizer, "center")
        summary = run(source, tmp_path / f"{fallback}/train", text)
        counts[fallback] = summary.manifest.text.unknown
        said = [line for line in captions_in_words(summary.manifest) if "text ids stand for letters" in line]
        assert len(said) == (not fallback)
    assert counts[True] is None and counts[False] >= 1


def test_a_row_that_is_too_short_for_an_image_is_told_what_would_hold_all(tmp_path):
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document([np.zeros(20, int), np.zeros(8, int)], [0, 1])
    with pytest.raises(DataFileError, match=r"data.sequence_length \(12\) room for it: 34 holds all rows in full"):
        T2IDataset(Path(tmp_path / "a"), VocabLayout(300, 64), 12)
