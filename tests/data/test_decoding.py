"""Threads that decode ahead: the same batches in the same order, files open as long as needed, errors passed on."""

import hashlib
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from captioned_images import make_encoding, output_bytes, run, write_images, write_shards
from PIL import Image
from source_layouts import PICTURES, write_parquet, write_tar

from megat2i.data.decoding import readable
from megat2i.data.encode_part import encode_part
from megat2i.data.encoders import _Progress
from megat2i.data.samples import Refused, Sample
from megat2i.data.sources import find_parts


class Numbers:
    """A part of ``count`` samples whose images are made in a random order of time; every seventh is refused."""

    def __init__(self, count: int, seen: list, fail: int | None = None):
        self.count, self.seen, self.fail = count, seen, fail

    def samples(self):
        for number in range(self.count):
            if number == self.fail:
                raise OSError("the disk is gone")
            yield Refused(f"{number}", "bad") if number % 7 == 3 else Sample(f"{number}", "x", self._image(number))

    def _image(self, number):
        def image(size):
            time.sleep(0.003 * (number * 7919 % 5))
            self.seen.append((number, threading.current_thread().name))
            return Image.new("RGB", (size, size), (number % 256, 0, 0))

        return image


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_and_refused_are_in_order_whatever_the_threads(threads):
    seen, refused, reports = [], [], []
    found = []
    for samples, images in readable(Numbers(150, seen), 4, "center", refused, reports.append, 32, threads):
        found.append([int(sample.name) for sample in samples])
        assert images[:, 0, 0, 0].tolist() == found[-1] and images.shape[1:] == (3, 4, 4)
        assert all(int(one.name) < found[-1][-1] + 8 for one in refused), "refused ahead of their batch"
    good = [number for number in range(150) if number % 7 != 3]
    assert found == [good[start : start + 32] for start in range(0, len(good), 32)]
    assert [int(one.name) for one in refused] == [number for number in range(150) if number % 7 == 3]
    assert sum(reports) == 150 and len({name for _, name in seen}) == threads


def test_the_next_batch_is_decoded_while_the_last_one_is_encoded_but_not_everything():
    seen = []
    batches = readable(Numbers(1000, seen), 4, "center", [], lambda _: None, 32, 2)
    next(batches)
    deadline = time.monotonic() + 20
    while len(seen) < 80 and time.monotonic() < deadline:  # this batch, the next one and what follows
        time.sleep(0.01)
    time.sleep(0.2)
    assert 80 <= len(seen) < 150
    batches.close()
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


def test_an_error_of_the_reader_reaches_the_caller():
    with pytest.raises(OSError, match="the disk is gone"):
        list(readable(Numbers(100, [], fail=50), 4, "center", [], lambda _: None, 16, 2))


@pytest.mark.parametrize("write", [write_tar, write_parquet])
def test_images_can_be_read_after_the_source_has_ended(tmp_path, write):
    (part,) = find_parts([write(tmp_path / f"a.{write.__name__.removeprefix('write_')}")], "train")
    samples = list(part.samples())
    assert [(one.caption, one.image(8).getpixel((3, 3))) for one in samples] == PICTURES
    open_files = [Path(f"/proc/self/fd/{fd.name}").resolve() for fd in Path("/proc/self/fd").iterdir()]
    del samples
    left = [Path(f"/proc/self/fd/{fd.name}").resolve() for fd in Path("/proc/self/fd").iterdir()]
    assert tmp_path / "a.tar" not in left and (write is write_parquet or tmp_path / "a.tar" in open_files)


def test_bytes_do_not_depend_on_decode_threads(tmp_path):
    encoding = make_encoding(tmp_path)
    (shard,) = write_shards(tmp_path / "in", 1, 90)
    content = bytearray(shard.read_bytes())
    content[512:520] = bytes(8)  # damages the first picture
    shard.write_bytes(content)
    (part,) = find_parts([str(shard)], "train")
    for threads in (1, 4):
        assert encode_part(part, tmp_path / f"{threads}", encoding, lambda _: None, threads).refused == 1
    for suffix in (".bin", ".idx", ".json", ".record.json"):
        assert Path(f"{tmp_path}/1{suffix}").read_bytes() == Path(f"{tmp_path}/4{suffix}").read_bytes()


def test_progress_with_unknown_totals_and_kept_parts(tmp_path):
    """Kept parts are done, but the rate, hence the time left, is that of what is being done."""
    encoding = make_encoding(tmp_path)
    parts = find_parts([str(path) for path in write_shards(tmp_path / "in", 4, 5)], "train")
    for number in (0, 1):
        encode_part(parts[number], tmp_path / str(number), encoding, lambda _: None)
    progress = _Progress(parts)
    assert progress.bar.total is None and progress.bar.line().startswith("encoding: 00:0")
    for number, part in enumerate(parts[:3]):
        encoded = encode_part(part, tmp_path / str(number), encoding, progress.bar.update)
        assert encoded.kept == (number < 2) and encoded.samples == 5
        progress.part_done(part, encoded)
        assert (progress.bar.done, progress.bar.total) == (5 * (number + 1), 20)
    progress.bar._started -= 10
    shown = progress.bar.line()
    progress.bar.close()
    expected = r"encoding: 15 of 20 images \(75%\), 00:1\d so far, 00:1\d left, 0\.[45]\d* images/s"
    assert re.fullmatch(expected, shown), shown


def test_source_digests_are_of_files_and_of_listings(tmp_path):
    encoding = make_encoding(tmp_path)
    source = write_images(tmp_path / "in", 5)
    manifest = run(source, tmp_path / "jsonl" / "train", encoding).manifest
    assert manifest.sources[0].sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    (shard,) = write_shards(tmp_path / "tars", 1, 5)
    manifest = run(shard, tmp_path / "tar" / "train", encoding).manifest
    assert (manifest.sources[0].sha256, manifest.sources[0].size) == (
        hashlib.sha256(shard.read_bytes()).hexdigest(),
        shard.stat().st_size,
    )
    source.unlink()
    for number in range(5):
        (tmp_path / "in" / f"{number:04d}.txt").write_text("a caption")

    def folder(name):
        return run(tmp_path / "in", tmp_path / "in" / name, encoding).manifest.sources[0].sha256

    first = folder("inside")
    assert folder("again") == first, "the outputs in the folder are no part of its listing"
    parts = [
        replace(part, opens_source=opens) for part in find_parts([str(tmp_path / "in")], "train") for opens in (1, 0)
    ]
    parts = [replace(part, names=part.names[:2]) for part in parts]  # the file that changes is not among theirs
    for _ in range(2):
        kept = [encode_part(part, tmp_path / str(number), encoding, int).kept for number, part in enumerate(parts)]
    assert kept == [True, True]
    (tmp_path / "in" / "0003.txt").write_text("a longer caption")
    kept = [encode_part(part, tmp_path / str(number), encoding, int).kept for number, part in enumerate(parts)]
    assert kept == [False, True], "the part that tells of the source is written again, the other one is not"
    assert folder("changed") != first and output_bytes(tmp_path / "in" / "changed")
