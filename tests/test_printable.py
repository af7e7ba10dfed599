"""Foreign names in messages: no escape reaches a terminal, and other scripts stay readable."""

import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megat2i.checkpoint import CheckpointError
from megat2i.config import ConfigError, load
from megat2i.data.shards import parquet_parts
from megat2i.files import DataFileError
from megat2i.printable import ArgumentParser, printable
from megat2i.progress import Progress, say
from megat2i.tokenizers.text import load_text_tokenizer
from megat2i.trainer import RunError
from megat2i.weights_file import WeightFiles, read_checkpoint

HOSTILE = "\x1b[2J\x1b]0;x\x07\nerror: all is well"


def test_controls_are_written_out_and_scripts_stay():
    assert printable("a\x1b[2J\r\n\x9b\u202e\u2028\udcffz") == r"a\x1b[2J\r\n\x9b\u202e\u2028\udcffz"
    text = "caf\u00e9 \u65e5\u672c\u8a9e \u0627\u0644\u0639 \U0001f34e e\u0301"
    assert printable(text) == text


@pytest.mark.parametrize("kind", [ConfigError, CheckpointError, RunError, lambda text: DataFileError(text, "b", "c")])
def test_errors_are_one_printable_line(kind):
    assert str(kind(HOSTILE)).isprintable() and "all is well" in str(kind(HOSTILE))


def tensor_name(path):
    header = json.dumps({HOSTILE: {"dtype": "I64", "shape": [0], "data_offsets": [0, 0]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    WeightFiles(path)


def index_name(path):
    path.mkdir()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": HOSTILE + "/x"}}))
    WeightFiles(path)


def pickle_global(path):
    path.write_bytes(b"\x80\x02c\x1b[2Jos\nsystem\x1b[31m\n.")
    read_checkpoint(path)


def column_name(path):
    pq.write_table(pa.table({HOSTILE: [1]}), path)
    parquet_parts(path)


def tokenizer(path):
    path.with_suffix(".json").write_text('{"version": "\x1b[2J"')
    load_text_tokenizer(path.with_suffix(".json"))


def configuration(path):
    path.write_text(json.dumps({HOSTILE: 1}))
    load(path)


@pytest.mark.parametrize("act", [tensor_name, index_name, pickle_global, column_name, tokenizer, configuration])
def test_names_in_hostile_files(tmp_path, act):
    with pytest.raises((DataFileError, ConfigError)) as caught:
        act(tmp_path / "file")
    assert str(caught.value).isprintable()


def test_what_is_said_and_shown(capsys):
    say(HOSTILE)
    with Progress(1, HOSTILE, "x") as shown:
        shown.note(HOSTILE)
        assert shown.line().isprintable()
    assert capsys.readouterr().out.rstrip("\n").isprintable()


def test_errors_of_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tool", HOSTILE])
    with pytest.raises(SystemExit):
        ArgumentParser().parse_args()
    assert all(line.isprintable() for line in capsys.readouterr().err.split("\n")[:-1])
    assert "error: all is well" not in capsys.readouterr().err.split("\n")
