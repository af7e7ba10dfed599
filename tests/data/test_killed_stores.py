"""A kill at any file operation of what writes datasets, and two that want one prefix: what comes out is one dataset."""

import collections
import json
import os
import random
import shutil
import time
from functools import partial

import pytest
from captioned_images import OUTPUTS, make_encoding, output_bytes, write_images
from kill_points import exit_code, kill_points

from megat2i.data.array_job import write_share
from megat2i.data.encode_part import encode_part
from megat2i.data.manifest import Manifest
from megat2i.data.merge import merge_datasets, only_writer
from megat2i.data.sources import find_parts
from megat2i.files import DataFileError


@pytest.fixture(scope="module")
def encoding(tmp_path_factory):
    return make_encoding(tmp_path_factory.mktemp("tokenizers"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Two parts of two pictures each."""
    folder = tmp_path_factory.mktemp("pictures")
    return [find_parts([str(write_images(folder / name, 2))], "train")[0] for name in "ab"]


@pytest.fixture(scope="module")
def stores(parts, encoding, tmp_path_factory):
    """Prefixes of the finished datasets of the two parts."""
    folder = tmp_path_factory.mktemp("stores")
    prefixes = [folder / f"{number:06d}" for number in range(len(parts))]
    for part, prefix in zip(parts, prefixes, strict=True):
        encode_part(part, prefix, encoding, lambda done: None)
    return prefixes


def tokens_of(prefix) -> dict[str, bytes]:
    """All files of a dataset but the manifest, which names the tokenizers by their way from its own folder."""
    return {suffix: content for suffix, content in output_bytes(prefix).items() if suffix != ".json"}


def renew(folder, template=None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if template:
        shutil.copytree(template, folder)
    else:
        folder.mkdir()


def test_a_store_is_whole_after_the_same_command(parts, encoding, stores, tmp_path, stride):
    """Index, tokens, ledger, use of the codebook and manifest, through the task of an array."""
    folder = tmp_path / "out"
    write = partial(write_share, parts[:1], folder / "x", encoding, 1, 0, 1)
    for number in kill_points(folder, partial(renew, folder), write, stride):
        prefix = folder / "x.shards" / "000000"
        if Manifest.read(prefix):  # it is written last and vouches for the rest
            Manifest.read(prefix).verify(prefix)
        assert exit_code(write) == 0, number
        assert tokens_of(prefix) == tokens_of(stores[0])
        left = {path.name for path in folder.rglob("*") if path.is_file() and not path.name.startswith("000000")}
        assert {name for name in left if ".tmp" not in name} == {"job.json", "lock"}
        assert not [name for name in left if ".tmp" in name and not name.startswith("job.json.")]  # kept for a day


@pytest.mark.parametrize("replaced", [False, True])
def test_a_merged_dataset_is_whole_after_the_same_command(stores, tmp_path, replaced, stride):
    begun, folder = tmp_path / "begun", tmp_path / "out"
    begun.mkdir()
    if replaced:
        merge_datasets(stores[:1], begun / "x", False)
    merge_datasets(stores, tmp_path / "expected", False)
    expected = tokens_of(tmp_path / "expected")
    merge = partial(merge_datasets, stores, folder / "x", replaced)
    for number in kill_points(folder, partial(renew, folder, begun), merge, stride):
        complete = not replaced and Manifest.read(folder / "x") is not None
        if complete:
            with pytest.raises(DataFileError, match="there is a complete dataset"):
                merge()
            merge_datasets(stores, folder / "x", True)
        else:
            merge()
        Manifest.read(folder / "x").verify(folder / "x")
        assert tokens_of(folder / "x") == expected, number
        assert {path.name for path in folder.iterdir()} == {f"x{suffix}" for suffix in OUTPUTS}


def test_at_most_one_writes_a_prefix(tmp_path):
    """Four processes take the lock and give it back as fast as they can; each failure to be alone counts."""

    def contend(name: str) -> None:
        counts, end = collections.Counter(), time.monotonic() + 0.8
        while time.monotonic() < end:
            try:
                with only_writer(tmp_path / "x", overwrite=True) as folder:
                    try:
                        os.close(os.open(tmp_path / "inside", os.O_CREAT | os.O_EXCL))
                    except FileExistsError:
                        counts["two inside"] += 1
                        continue
                    counts["alone"] += 1
                    counts["without a folder"] += not folder.exists()
                    time.sleep(random.random() * 0.002)
                    os.unlink(tmp_path / "inside")
            except DataFileError as error:
                assert "another run is writing" in str(error)
        (tmp_path / name).write_text(json.dumps(counts))

    pids = []
    for number in range(4):
        pids.append(os.fork())
        if pids[-1] == 0:
            code = 1
            try:
                contend(f"counts{number}")
                code = 0
            finally:
                os._exit(code)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * 4
    total = collections.Counter()
    for number in range(4):
        total.update(json.loads((tmp_path / f"counts{number}").read_text()))
    assert total["two inside"] == 0 == total["without a folder"] and total["alone"] > 10, total
    assert [path.name for path in tmp_path.glob("x*")] == []
