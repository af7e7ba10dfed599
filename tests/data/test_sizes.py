"""What a configuration leaves to its data, and what is said where the data are not there."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megat2i.config import ConfigError, DatasetConfig, VocabConfig
from megat2i.data.indexed import IndexedDataset, IndexedWriter
from megat2i.data.sizes import longest_row, require_stores, with_data_sizes
from megat2i.data.t2i_dataset import T2IDataset
from megat2i.files import DataFileError


@pytest.fixture
def left_out(run_config, tmp_path):
    """A configuration that leaves the vocabulary and the length of a row to the data."""
    config = run_config(tmp_path / "run")
    return replace(config, vocab=VocabConfig(), data=replace(config.data, sequence_length=None))


def on(config, *prefixes, **changes):
    data = replace(config.data, train=[DatasetConfig(str(prefix)) for prefix in prefixes], **changes)
    return replace(config, data=data)


def test_the_length_holds_the_longest_caption_and_no_more_than_it_must(left_out, tiny_store):
    settings = with_data_sizes(left_out)
    longest = longest_row(IndexedDataset(tiny_store / "train"))
    assert longest <= settings.data.sequence_length < longest + 8 and settings.data.sequence_length % 8 == 0
    assert settings.vocab.image_codes == 40
    dataset = T2IDataset(tiny_store / "train", settings.vocab_layout, longest)
    assert dataset.cut_captions == 0
    assert T2IDataset(tiny_store / "train", settings.vocab_layout, longest - 1).cut_captions > 0
    given = replace(left_out, data=replace(left_out.data, sequence_length=19))
    assert with_data_sizes(given).data.sequence_length == 19


def test_the_longest_of_all_datasets_counts(left_out, tiny_store, tmp_path):
    shutil.copytree(tiny_store, tmp_path / "data")
    with IndexedWriter(tmp_path / "data/long", np.uint16) as writer:
        writer.add_document([np.zeros(50, int), np.zeros(4, int)], [0, 1])
    folder = tmp_path / "data"
    alone = with_data_sizes(left_out).data.sequence_length
    assert with_data_sizes(on(left_out, folder / "train", folder / "long")).data.sequence_length == 64 > alone
    assert with_data_sizes(on(left_out, folder / "train", valid=str(folder / "long"))).data.sequence_length == 64
    images = on(left_out, folder / "train", folder / "long", mode="image_only")
    assert with_data_sizes(images).data.sequence_length == 8


def test_text_has_no_length_of_its_own(left_out, text_store):
    settings = replace(on(left_out, text_store / "train", mode="text_only"), vocab=VocabConfig(None, 1))
    with pytest.raises(ConfigError, match="data.sequence_length is not set: a text without images has no length"):
        with_data_sizes(settings)


@pytest.mark.parametrize(
    ("key", "ending", "words"),
    [
        ("train", "nope", r"nope.idx: not found.*data.train\[0\].prefix .*--output-prefix"),
        ("train", "train.bin", r"data.train\[0\].prefix takes it without the ending: .*/train$"),
        ("valid", "gone", r"gone.idx: not found.*data.valid "),
    ],
)
def test_missing_data_are_named_with_their_key(left_out, tiny_store, key, ending, words):
    prefix = str(tiny_store / ending)
    settings = on(left_out, prefix) if key == "train" else on(left_out, tiny_store / "train", valid=prefix)
    with pytest.raises(DataFileError, match=words):
        with_data_sizes(settings)
    with pytest.raises(DataFileError, match=words):
        require_stores(settings.data)


def test_a_relative_prefix_says_where_it_is_looked_for(left_out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataFileError, match=f"it is looked for from {tmp_path}"):
        require_stores(on(left_out, Path("data/nope")).data)


def test_a_missing_manifest_is_named(left_out, tiny_store, tmp_path):
    shutil.copytree(tiny_store, tmp_path / "data")
    (tmp_path / "data/train.json").unlink()
    with pytest.raises(DataFileError, match=r"train.json: not found. It says vocab.text_tokens: put it back"):
        with_data_sizes(on(left_out, tmp_path / "data/train"))
