"""Interrupted and repeated runs: nothing half-done looks complete, nothing stale is kept, nothing replaced unasked."""

import errno
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from captioned_images import (
    OUTPUTS,
    TOOL,
    caption,
    locked,
    make_encoding,
    output_bytes,
    picture,
    run,
    tool,
    wait_for_parts,
    wait_for_workers,
    write_images,
    write_shards,
)

import megat2i.data.encoders as engine
import megat2i.data.merge as merging
from megat2i.data.encode_part import Encoding
from megat2i.data.indexed import IndexedDataset
from megat2i.data.manifest import Manifest
from megat2i.files import DataFileError
from megat2i.tokenizers.text import train_text_tokenizer


@pytest.fixture(scope="module")
def encoding(tmp_path_factory):
    return make_encoding(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture
def small_parts(monkeypatch):
    """Blocks of 4 samples, so that a few images make several parts."""
    monkeypatch.setattr("megat2i.data.sources.BLOCK", 4)


def test_sigkill_in_the_middle_then_the_same_command_gives_the_same_bytes(tmp_path, encoding):
    prefix = tmp_path / "killed" / "train"
    tokenizers = ("--text-tokenizer", encoding.text_tokenizer, "--image-tokenizer", encoding.image_tokenizer)
    arguments = ["--input", *write_shards(tmp_path / "in", 8, 40), *tokenizers, "--workers", 2, "--output-prefix"]
    command = [sys.executable, TOOL, *map(str, arguments), str(prefix)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    finished = wait_for_parts(process, tmp_path / "killed" / "train.parts", 2)
    os.kill(process.pid, signal.SIGKILL)  # the main process alone: its workers have to notice
    process.wait()
    wait_for_workers(process.pid)
    assert not list(prefix.parent.glob("train.idx")), "killed too late to prove anything"
    with pytest.raises(DataFileError):
        IndexedDataset(prefix)
    assert Manifest.read(prefix) is None
    second_name = tmp_path / "kept"  # the parts are removed at the end of the next run
    os.link(finished[0], second_name)
    before = second_name.read_bytes(), second_name.stat().st_mtime_ns
    tool(*arguments, prefix)
    assert (second_name.read_bytes(), second_name.stat().st_mtime_ns) == before
    tool(*arguments, tmp_path / "whole" / "train")
    assert output_bytes(prefix) == output_bytes(tmp_path / "whole" / "train")
    assert sorted(path.name for path in prefix.parent.iterdir()) == sorted(f"train{suffix}" for suffix in OUTPUTS)


class _Stop(Exception):
    pass


def interrupted_run(source, prefix, encoding, monkeypatch, after: int) -> None:
    """A run that ends by an exception after ``after`` parts."""
    real, done = engine.encode_part, []

    def encode_part(*arguments):
        if len(done) == after:
            raise _Stop
        done.append(real(*arguments))
        return done[-1]

    with monkeypatch.context() as patch:
        patch.setattr(engine, "encode_part", encode_part)
        with pytest.raises(_Stop):
            run(source, prefix, encoding)


def part_times(prefix: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in Path(f"{prefix}.parts").glob("*.bin")}


@pytest.mark.parametrize("change", ["nothing", "crop", "tokenizer", "image", "flipped byte", "cut file", "no record"])
def test_only_valid_parts_of_the_same_settings_are_kept(tmp_path, encoding, small_parts, monkeypatch, change):
    source, prefix = write_images(tmp_path / "in", 12), tmp_path / "out" / "train"
    interrupted_run(source, prefix, encoding, monkeypatch, after=2)
    before = part_times(prefix)
    assert len(before) == 2
    parts, redone = Path(f"{prefix}.parts"), {"000000.bin"}
    if change == "nothing":
        redone = set()
    elif change == "crop":
        encoding, redone = Encoding(encoding.text_tokenizer, encoding.image_tokenizer, "pad"), set(before)
    elif change == "tokenizer":
        train_text_tokenizer(map(caption, range(9)), 280, tmp_path / "other.json")
        encoding, redone = Encoding(tmp_path / "other.json", encoding.image_tokenizer, "center"), set(before)
    elif change == "image":
        picture(99).save(tmp_path / "in" / "0001.png")
    elif change == "flipped byte":
        content = bytearray((parts / "000000.bin").read_bytes())
        content[5] ^= 1
        (parts / "000000.bin").write_bytes(content)
    elif change == "cut file":
        os.truncate(parts / "000000.idx", 40)
    else:
        (parts / "000000.record.json").write_text("{}")
    interrupted_run(source, prefix, encoding, monkeypatch, after=2)  # runs again over the first two parts
    after = part_times(prefix)
    assert {name for name in before if after[name] != before[name]} == redone
    run(source, prefix, encoding)
    run(source, tmp_path / "fresh" / "train", encoding)
    for suffix in (".bin", ".idx", ".ledger.jsonl"):
        assert output_bytes(prefix)[suffix] == output_bytes(tmp_path / "fresh" / "train")[suffix]


def test_an_existing_dataset_is_not_replaced_unless_asked(tmp_path, encoding):
    source, prefix = write_images(tmp_path / "in", 6), tmp_path / "out" / "train"
    run(source, prefix, encoding)
    first = output_bytes(prefix)
    picture(50).save(tmp_path / "in" / "0000.png")
    with pytest.raises(DataFileError, match="there is a complete dataset. Pass --overwrite"):
        run(source, prefix, encoding)
    assert output_bytes(prefix) == first
    run(source, prefix, encoding, overwrite=True)
    assert output_bytes(prefix)[".bin"] != first[".bin"]
    Manifest.read(prefix).verify(prefix)
    Path(f"{prefix}.json").unlink()
    with pytest.raises(DataFileError, match="that this tool did not write"):
        run(source, prefix, encoding)


def test_a_failed_replacement_leaves_the_old_dataset_whole(tmp_path, encoding, small_parts, monkeypatch):
    source, prefix = write_images(tmp_path / "in", 12), tmp_path / "out" / "train"
    run(source, prefix, encoding)
    first = output_bytes(prefix)
    monkeypatch.setattr(sys.modules[__name__], "run", partial(run, overwrite=True))
    picture(50).save(tmp_path / "in" / "0000.png")
    interrupted_run(source, prefix, encoding, monkeypatch, after=1)
    assert output_bytes(prefix) == first
    Manifest.read(prefix).verify(prefix)


def test_two_runs_on_one_prefix_do_not_mix(tmp_path, encoding):
    source, prefix = write_images(tmp_path / "in", 6), tmp_path / "out" / "train"
    with locked(Path(f"{prefix}.parts")), pytest.raises(DataFileError, match="another run is writing this dataset"):
        run(source, prefix, encoding)
    run(source, prefix, encoding)


def test_a_dataset_that_another_run_finished_before_the_lock_is_kept(tmp_path, encoding, monkeypatch):
    source, other, prefix = write_images(tmp_path / "in", 6), tmp_path / "other" / "train", tmp_path / "out" / "train"
    run(source, other, encoding)
    real = merging.only_run

    def only_run(folder):
        for suffix, content in output_bytes(other).items():
            Path(f"{prefix}{suffix}").write_bytes(content)
        before.update(output_bytes(prefix))
        return real(folder)

    before = {}
    monkeypatch.setattr(merging, "only_run", only_run)
    with pytest.raises(DataFileError, match="there is a complete dataset"):
        run(source, prefix, encoding)
    assert output_bytes(prefix) == before


@pytest.mark.parametrize("fails", [False, True])
def test_the_folder_of_parts_is_removed_when_its_lock_is_closed(tmp_path, encoding, monkeypatch, fails):
    """NFS renames what is removed while it is open, and the folder is then not empty: no reason to fail."""
    real, removed = Path.rmdir, []

    def rmdir(path):
        held = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        assert not [file for file in held if file.startswith(f"{path}/lock")]
        removed.append(path)
        if fails:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        real(path)

    monkeypatch.setattr(Path, "rmdir", rmdir)
    prefix = tmp_path / "out" / "train"
    run(write_images(tmp_path / "in", 6), prefix, encoding)
    assert removed == [tmp_path / "out" / "train.parts"]
    assert [list(path.iterdir()) for path in prefix.parent.glob("*.parts")] == ([[]] if fails else [])
