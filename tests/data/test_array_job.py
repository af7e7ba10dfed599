"""Tasks of an array: shards in, shards out, whatever is killed; nothing written twice; together the unsharded bytes."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from captioned_images import (
    TOOL,
    locked,
    make_encoding,
    output_bytes,
    run,
    tool,
    wait_for_parts,
    wait_for_workers,
    write_images,
    write_shards,
)
from source_layouts import png

from megat2i.data.array_job import _remove_leftovers, shard_prefixes, share_of, write_once, write_share
from megat2i.data.encode_part import encode_part
from megat2i.data.indexed import IndexedDataset
from megat2i.data.manifest import Manifest
from megat2i.data.merge import merge_datasets
from megat2i.data.shards import whole_files
from megat2i.data.sources import find_parts
from megat2i.files import DataFileError

EQUAL = (".bin", ".idx", ".ledger.jsonl", ".codebook.json")


@pytest.fixture(scope="module")
def encoding(tmp_path_factory):
    return make_encoding(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Three parts of 4 images, two of them with an unreadable one."""
    monkeypatch.setattr("megat2i.data.sources.BLOCK", 4)
    source = write_images(tmp_path / "in", 12)
    for number in (1, 9):
        (tmp_path / "in" / f"{number:04d}.png").write_bytes(b"broken")
    return find_parts([str(source)], "train")


def same_as_unsharded(sharded: Path, whole: Path) -> None:
    for suffix in EQUAL:
        assert output_bytes(sharded)[suffix] == output_bytes(whole)[suffix], suffix
    found, expected = Manifest.read(sharded), Manifest.read(whole)
    assert found.bin_blocks == expected.bin_blocks and found.sources == expected.sources
    text, image = (replace(getattr(expected, n), tokenizer=getattr(found, n).tokenizer) for n in ("text", "image"))
    assert found == replace(expected, text=text, image=image)


def test_tasks_killed_and_parallel_then_merged_equal_one_run(tmp_path, encoding):
    prefix = tmp_path / "sharded" / "train"
    tokenizers = ("--text-tokenizer", encoding.text_tokenizer, "--image-tokenizer", encoding.image_tokenizer)
    inputs = ("--input", *write_shards(tmp_path / "in", 6, 40), *tokenizers, "--workers", 1)
    common = (*inputs, "--output-prefix", prefix)
    command = [sys.executable, TOOL, *map(str, common), "--shard-index", "0", "--num-shards", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    (finished,) = wait_for_parts(process, tmp_path / "sharded" / "train.shards", 1)[:1]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for_workers(process.pid)
    before = finished.stat().st_mtime_ns
    assert not (finished.parent / "000002.json").exists(), "killed too late to prove anything"
    with pytest.raises(DataFileError, match=r"[45] of 6 shards are not finished: 00000[12] \(.*[12]\.tar\), "):
        shard_prefixes(finished.parent)
    array = {"SLURM_ARRAY_TASK_MIN": "7", "SLURM_ARRAY_TASK_MAX": "8", "SLURM_ARRAY_TASK_COUNT": "2"}
    environment = [os.environ | array | {"SLURM_ARRAY_TASK_ID": task} for task in "78"]
    with ThreadPoolExecutor(2) as tasks:
        said = list(tasks.map(lambda env: tool(*common, env=env).stdout, environment))
    assert "task 0 of 2: shards 0 to 2 of 6: 120 captioned images" in said[0]
    assert "task 1 of 2: shards 3 to 5 of 6: 120 captioned images" in said[1]
    assert any("next: python tools/merge_data.py" in text for text in said)
    assert finished.stat().st_mtime_ns == before, "a finished shard was written again"
    assert not list(finished.parent.glob("*.tmp"))
    merge_datasets(shard_prefixes(finished.parent), prefix, overwrite=False)
    tool(*inputs, "--output-prefix", tmp_path / "whole" / "train")
    same_as_unsharded(prefix, tmp_path / "whole" / "train")


def test_every_shard_is_a_finished_dataset_and_ledgers_and_counts_add_up(tmp_path, encoding, parts):
    prefix = tmp_path / "out" / "train"
    done = [write_share(parts, prefix, encoding, 1, index, 2) for index in (0, 1)]
    assert [(one.share, one.samples, one.refused, one.finished) for one in done] == [
        (range(1), 4, 1, 1),
        (range(1, 3), 8, 1, 3),
    ]
    for number, store in enumerate(shard_prefixes(tmp_path / "out" / "train.shards")):
        assert IndexedDataset(store).number_of_documents == (3, 4, 3)[number]
        Manifest.read(store).verify(store)
        assert (store.parent / Manifest.read(store).text.tokenizer).resolve() == encoding.text_tokenizer
    merge_datasets(shard_prefixes(tmp_path / "out" / "train.shards"), prefix, overwrite=False)
    run(tmp_path / "in" / "captions.jsonl", tmp_path / "whole" / "train", encoding)
    same_as_unsharded(prefix, tmp_path / "whole" / "train")
    assert sum(one.codebook.counts.sum() for one in done) == 40


@pytest.mark.parametrize("fault", ["missing", ".bin", ".idx", ".json", "no ledger"])
def test_a_missing_or_damaged_shard_is_refused_without_a_trace(tmp_path, encoding, parts, fault):
    folder = tmp_path / "out" / "train.shards"
    write_share(parts, tmp_path / "out" / "train", encoding, 1, 0, 1)
    path = folder / f"000001{ {'missing': '.json', 'no ledger': '.ledger.jsonl'}.get(fault, fault) }"
    content = path.read_bytes()
    path.unlink()
    if fault not in ("missing", "no ledger"):
        path.write_bytes(content[:30] + bytes([content[30] ^ 1]) + content[31:])
    with pytest.raises(DataFileError, match="000001"):
        merge_datasets(shard_prefixes(folder), tmp_path / "out" / "train", overwrite=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.shards"]
    write_share(parts, tmp_path / "out" / "train", encoding, 1, 0, 1)  # the remedy: the task again
    assert path.read_bytes() == content


def test_a_manifest_declares_ledger_and_counts_too(tmp_path, encoding, parts):
    """The worker writes them before: a task killed right after the manifest loses no refused sample."""
    encode_part(parts[0], tmp_path / "000000", encoding, lambda _: None)
    names = ("000000.ledger.jsonl", "000000.codebook.json", "000000.json")
    ledger, codebook, manifest = (tmp_path / name for name in names)
    assert json.loads(ledger.read_text())["sample"] == "line 2: 0001.png"
    assert max(ledger.stat().st_mtime_ns, codebook.stat().st_mtime_ns) < manifest.stat().st_mtime_ns


def test_a_share_that_another_task_is_writing_is_refused(tmp_path, encoding, parts):
    prefix = tmp_path / "out" / "train"
    with locked(tmp_path / "out" / "train.shards", first=1, number=1):
        write_share(parts, prefix, encoding, 1, 0, 3)
        for index, number in ((1, 3), (0, 1)):
            with pytest.raises(DataFileError, match="another run is writing this dataset"):
                write_share(parts, prefix, encoding, 1, index, number)
    write_share(parts, prefix, encoding, 1, 0, 1)


def test_tasks_of_another_job_are_refused(tmp_path, encoding, parts):
    prefix = tmp_path / "out" / "train"
    write_share(parts, prefix, encoding, 1, 0, 3)
    with pytest.raises(DataFileError, match="not of the same job: it has other crop"):
        write_share(parts, prefix, replace(encoding, crop="pad"), 1, 1, 3)
    with pytest.raises(DataFileError, match="not of the same job: it has other parts_sha256, shards"):
        write_share(parts[:2], prefix, encoding, 1, 1, 2)


def test_temporary_files_of_a_killed_task_go_those_of_others_stay(tmp_path, encoding, parts):
    folder = tmp_path / "out" / "train.shards"
    folder.mkdir(parents=True)
    names = [f"00000{shard}.bin.7-ab.tmp" for shard in range(3)]
    for name in names:
        (folder / name).touch()
    write_share(parts, tmp_path / "out" / "train", encoding, 1, 1, 3)
    assert sorted(path.name for path in folder.glob("*.tmp")) == [names[0], names[2]]


def test_leftovers_belong_to_the_whole_number_of_their_shard(tmp_path):
    for name in ("100000.bin.7-ab.tmp", "1000000.bin.7-ab.tmp", "1000001.bin.7-ab.tmp"):
        (tmp_path / name).touch()
    _remove_leftovers(tmp_path, range(100_000, 100_001))
    assert len(list(tmp_path.iterdir())) == 2
    _remove_leftovers(tmp_path, range(1_000_000, 1_000_001))
    assert [path.name for path in tmp_path.iterdir()] == ["1000001.bin.7-ab.tmp"]


def test_shares_are_disjoint_and_complete():
    for shards in (0, 1, 7, 100):
        for number in (1, 3, 8, 130):
            shares = [share_of(shards, index, number) for index in range(number)]
            assert [shard for share in shares for shard in share] == list(range(shards))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_file_is_written_once_by_whoever_comes_first(tmp_path, monkeypatch):
    with ThreadPoolExecutor(8) as tasks:
        list(tasks.map(lambda _: write_once(tmp_path / "a", b"same"), range(64)))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with monkeypatch.context() as patch:  # between a look and the writing, another task wrote it
        patch.setattr(Path, "exists", lambda path: False)
        write_once(tmp_path / "a", b"same")
        with pytest.raises(DataFileError, match="another file of this name"):
            write_once(tmp_path / "a", b"other")
    with pytest.raises(DataFileError, match="another file of this name"):
        write_once(tmp_path / "a", b"other")
    assert (tmp_path / "a").read_bytes() == b"same"


def test_a_parquet_file_is_one_shard(tmp_path, monkeypatch):
    monkeypatch.setattr("megat2i.data.shards.BLOCK", 2)
    for name in "ab":
        table = pa.table({"image": [png("red")] * 5, "caption": [f"{name}{row}" for row in range(5)]})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
    parts = find_parts([str(tmp_path / f"{name}.parquet") for name in "ab"], "train")
    whole = whole_files(parts)
    assert (len(parts), [part.expected for part in whole]) == (6, [5, 5])
    captions = [[sample.caption for part in some for sample in part.samples()] for some in (parts, whole)]
    assert captions[0] == captions[1] == [f"{name}{row}" for name in "ab" for row in range(5)]


# The command line


@pytest.mark.parametrize(
    ("environment", "arguments", "problem"),
    [
        (
            (3, 3, 9, 2),
            [],
            "the task ids of this array, 3 to 9, are not 2 in a row: pass --num-shards",
        ),
        (None, ["--shard-index", 1], "--shard-index and --num-shards go together"),
        (None, ["--shard-index", 2, "--num-shards", 2], "--shard-index is 2, expected 0 to 1"),
        (
            (0, 0, 1, 2),
            ["--image-tokenizer", "patch"],
            "tasks of an array do not fit tokenizers, which all of them need",
        ),
        ((0, 0, 1, 2), ["--overwrite"], "--overwrite is not for a task of an array"),
    ],
)
def test_wrong_arrays_are_one_sentence_before_any_work(
    tmp_path, encoding, command_line, monkeypatch, capsys, environment, arguments, problem
):
    for name, value in zip(("ID", "MIN", "MAX", "COUNT"), environment or (), strict=False):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    files = ("--text-tokenizer", encoding.text_tokenizer, "--image-tokenizer", encoding.image_tokenizer)
    with pytest.raises(SystemExit) as end:
        command_line(
            "--input", write_images(tmp_path / "in", 1), "--output-prefix", tmp_path / "out", *files, *arguments
        )
    assert end.value.code not in (0, None) and problem in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("out*"))


def test_tokenizers_of_a_job_are_copied_beside_it_once(tmp_path, encoding, command_line):
    files = ("--text-tokenizer", encoding.text_tokenizer, "--image-tokenizer", encoding.image_tokenizer)
    source, out = write_images(tmp_path / "in", 3), tmp_path / "out"
    task = ("--input", source, "--workers", 1, "--shard-index", 0, "--num-shards", 1)
    command_line(*task, *files, "--output-prefix", out / "train")
    assert (out / "text_tokenizer.json").read_bytes() == encoding.text_tokenizer.read_bytes()
    assert json.loads((out / "train.shards" / "job.json").read_text())["shards"] == [str(source)]
    assert Manifest.read(out / "train.shards" / "000000").image.tokenizer == "../image_tokenizer.safetensors"
    (out / "text_tokenizer.json").write_text("{}")
    with pytest.raises(SystemExit, match="there is another file of this name, and datasets may depend on it"):
        command_line(*task, *files, "--output-prefix", out / "valid")


def test_one_task_of_an_array_does_its_own_share_and_opens_no_other_tar(
    tmp_path, encoding, command_line, monkeypatch, capsys
):
    tars = write_shards(tmp_path / "in", 3, 2)
    tars[0].write_bytes(b"not a tar")
    for name, value in zip(("ID", "MIN", "MAX", "COUNT"), (2, 2, 2, 1), strict=True):  # sbatch --array=2
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    files = ("--text-tokenizer", encoding.text_tokenizer, "--image-tokenizer", encoding.image_tokenizer)
    task = ("--input", *tars, "--output-prefix", tmp_path / "out" / "train", *files, "--workers", 1, "--num-shards", 3)
    command_line(*task)
    assert "task 2 of 3: shards 2 to 2 of 3: 2 captioned images" in capsys.readouterr().out
    with pytest.raises(DataFileError, match="--shard-index 0 --num-shards 3; --shard-index 1 --num-shards 3$"):
        shard_prefixes(tmp_path / "out" / "train.shards")
    with pytest.raises(SystemExit, match="0.tar: not a readable tar archive"):
        command_line(*task, "--shard-index", 0)
