"""A manifest or a header that says something else than was written means the checkpoint before, never a traceback."""

import hashlib
import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist
from distributed import run_ranks
from numbered_engine import flat_engine, newest, rewrite_manifest, save_steps

from megat2i import checkpoint
from megat2i.checkpoint import CheckpointError
from megat2i.checkpoint.manifest import FORMAT_VERSION, MANIFEST, WITHOUT_FILES

RANK_FILE = "rank-00000.safetensors"


def refused(folder: Path, what: str) -> str:
    """That step 4 of ``folder`` is skipped for step 2; returns why."""
    step, lines = newest(folder)
    assert step == 2 and len(lines) == 1, f"{what}: step {step}, {lines}"
    return lines[0]


def content(folder: Path) -> dict:
    return json.loads(json.loads((folder / "step-4" / MANIFEST).read_text())["manifest"])


def as_older_format(folder: Path) -> None:
    """Make step 4 what it would have been before the headers had a digest."""
    manifest = content(folder)
    del manifest["files"]
    sign(folder, json.dumps(manifest | {"format": WITHOUT_FILES}))


def sign(folder: Path, text: str) -> None:
    body = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": text}
    (folder / "step-4" / MANIFEST).write_text(json.dumps(body))


def split_header(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def write_header(path: Path, header: dict, values: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + values)


def test_another_dtype_in_the_header_is_refused(tmp_path):
    """One byte that no digest of the values covers: integers were read for float32 and trained on."""

    def run():
        save_steps(tmp_path, 2, 4)
        path = tmp_path / "step-4" / RANK_FILE
        data = path.read_bytes()
        for place in [at for at in range(len(data)) if data[at : at + 3] == b"F32"]:
            for letter in b"IU":
                changed = bytearray(data)
                changed[place] = letter
                path.write_bytes(changed)
                assert "header" in refused(tmp_path, "dtype")
        path.write_bytes(data)
        assert newest(tmp_path) == (4, [])

    run_ranks(1, run)


def test_any_changed_byte_of_a_header_is_refused(tmp_path):
    def run():
        save_steps(tmp_path, 2, 4)
        path, generator = tmp_path / "step-4" / RANK_FILE, random.Random(2)
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        changes = [(place, data[place] ^ generator.randrange(1, 256)) for place in range(0, end, 3)]
        # Every reader of the format accepts these: another type of 32 bits, and other white space.
        places = [match.start() for match in re.finditer(rb"F32|(?<=[,:}]) *\Z", data[:end])]
        assert len(places) > 1
        changes += [(place, other) for place in places for other in (b"IU" if data[place] == ord("F") else b"\n\t")]
        for place, value in changes:
            changed = bytearray(data)
            changed[place] = value
            path.write_bytes(changed)
            refused(tmp_path, f"byte {place} is {value}")

    run_ranks(1, run)


HEADER_LIES = {
    "bfloat16 of twice the length": {"dtype": "BF16", "shape": [600]},
    "bytes": {"dtype": "U8", "shape": [1200]},
    "eight-bit floats": {"dtype": "F8_E4M3", "shape": [1200]},
    "four-bit floats": {"dtype": "F4", "shape": [2400]},
    "integers": {"dtype": "I32"},
    "two dimensions": {"shape": [1, 300]},
    "a word for a shape": {"shape": "300"},
    "a negative offset": {"data_offsets": [-4, 1196]},
}


@pytest.mark.parametrize("older", [False, True])
def test_a_header_that_lies_about_the_same_bytes_is_refused(tmp_path, older):
    def run():
        save_steps(tmp_path, 2, 4)
        if older:
            as_older_format(tmp_path)
        path = tmp_path / "step-4" / RANK_FILE
        header, values = split_header(path)
        name = next(key for key in header if key != "__metadata__")
        for what, lie in HEADER_LIES.items():
            write_header(path, header | {name: header[name] | lie}, values)
            refused(tmp_path, what)
        for length in (2**40, 2**63):
            path.write_bytes(length.to_bytes(8, "little") + b"{}" + values)
            refused(tmp_path, f"header of {length} bytes")

    run_ranks(1, run)


def test_an_older_checkpoint_is_read(tmp_path):
    def run():
        save_steps(tmp_path, 2, 4)
        assert content(tmp_path)["format"] == FORMAT_VERSION
        as_older_format(tmp_path)
        assert newest(tmp_path) == (4, [])  # which loads it and compares every value
        checkpoint.load_engine(checkpoint.latest_here(tmp_path), flat_engine())

    run_ranks(1, run)


def of_first_part(**changed):
    return lambda manifest: manifest["parts"][0].update(changed)


MANIFEST_LIES = {
    "a later step": lambda manifest: manifest.update(step=999),
    "a step below zero": lambda manifest: manifest.update(step=-4),
    "a word for a step": lambda manifest: manifest.update(step="4"),
    "more updates than steps": lambda manifest: manifest.update(optimizer_updates=10**9),
    "no updates": lambda manifest: manifest.pop("optimizer_updates"),
    "no format": lambda manifest: manifest.pop("format"),
    "no author": lambda manifest: manifest.pop("written_by"),
    "no parts": lambda manifest: manifest.pop("parts"),
    "an empty list of parts": lambda manifest: manifest.update(parts=[]),
    "a part that is a number": lambda manifest: manifest.update(parts=[5]),
    "a part that is listed twice": lambda manifest: manifest["parts"].append(manifest["parts"][0]),
    "a file of another folder": of_first_part(file=f"../step-2/{RANK_FILE}"),
    "a file by its full path": of_first_part(file="/etc/passwd"),
    "a number for a file": of_first_part(file=5),
    "a file that is not listed": of_first_part(file="rank-00007.safetensors"),
    "no key": lambda manifest: manifest["parts"][0].pop("key"),
    "a key that is not there": of_first_part(key="weight/w/300"),
    "fewer elements": of_first_part(boxes=[[[0], [1]]]),
    "elements beyond the tensor": of_first_part(boxes=[[[0], [301]]]),
    "more dimensions than the tensor": of_first_part(boxes=[[[0, 0], [300, 1]]]),
    "no boxes": of_first_part(boxes=None),
    "a smaller tensor": of_first_part(shape=[1]),
    "an unknown kind": of_first_part(kind="momentum"),
    "a kind that is a list": of_first_part(kind=["weight"]),
    "a short digest": of_first_part(sha256="00"),
    "no files": lambda manifest: manifest.pop("files"),
    "a file without a size": lambda manifest: manifest["files"][RANK_FILE].pop("bytes"),
    "a file that is a list": lambda manifest: manifest["files"].update({RANK_FILE: []}),
    "a longer file": lambda manifest: manifest["files"][RANK_FILE].update(bytes=10**6),
}


def test_a_manifest_that_lies_with_a_digest_that_matches_is_refused(tmp_path):
    def run():
        save_steps(tmp_path, 2, 4)
        truth = json.dumps(content(tmp_path))
        for what, change in MANIFEST_LIES.items():
            manifest = json.loads(truth)
            change(manifest)
            sign(tmp_path, json.dumps(manifest))
            refused(tmp_path, what)
            assert checkpoint.latest_here(tmp_path).step == 2
        for text in ("[1]", "5", "[" * 100_000):
            sign(tmp_path, text)
            refused(tmp_path, text[:9])
        long_number = '{"sha256": ' + "9" * 100_000 + ', "manifest": ""}'
        for body in ("[]", '{"sha256": "", "manifest": 5}', '{"manifest": null}', "[" * 200_000, long_number):
            (tmp_path / "step-4" / MANIFEST).write_text(body)
            refused(tmp_path, body[:30])
        sign(tmp_path, truth)
        assert newest(tmp_path) == (4, [])

    run_ranks(1, run)


def test_a_step_under_the_name_of_another_is_refused(tmp_path):
    def run():
        save_steps(tmp_path, 2, 4)
        shutil.copytree(tmp_path / "step-4", tmp_path / "step-999999")
        step, lines = newest(tmp_path)
        assert step == 4 and "it is the manifest of step 4, in the folder step-999999" in lines[0]
        shutil.rmtree(tmp_path / "step-999999")
        shutil.rmtree(tmp_path / "step-4")
        shutil.copytree(tmp_path / "step-2", tmp_path / "step-4")
        refused(tmp_path, "step 2 as step 4")

    run_ranks(1, run)


@pytest.mark.parametrize("ranks", [1, 2])
def test_names_that_no_run_writes_are_ignored(tmp_path, ranks):
    def run():
        save_steps(tmp_path, 2)
        if dist.get_rank() == 0:
            for name in ("²", "٣", "9" * 240, "9" * 19, "007", "00000099", "-5", "+5", "5 ", "1_0", ""):
                (tmp_path / f"step-{name}").mkdir()
        dist.barrier()
        assert newest(tmp_path) == (2, [])
        save_steps(tmp_path, 3, keep=1)
        assert [path.name for path in checkpoint.committed(tmp_path)] == ["step-3"]

    run_ranks(ranks, run)


def test_a_rank_file_of_another_step_is_named(tmp_path):
    def run():
        save_steps(tmp_path, 2, 4)
        shutil.copy(tmp_path / "step-2" / RANK_FILE, tmp_path / "step-4")
        assert RANK_FILE in refused(tmp_path, "file of step 2")
        rewrite_manifest(tmp_path / "step-4" / MANIFEST, format=1)
        with pytest.raises(CheckpointError, match=r"format 1, this version reads 2 and 3"):
            checkpoint.open_checkpoint(tmp_path / "step-4")

    run_ranks(1, run)
