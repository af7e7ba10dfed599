"""Damage: any flipped bit, missing and torn files mean the checkpoint before; strangers in the folder mean nothing."""

import random
import shutil

import pytest
import torch.distributed as dist
from distributed import run_ranks
from numbered_engine import newest, save_steps

from megat2i import checkpoint
from megat2i.checkpoint import CheckpointError


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_flipped_bit_anywhere_is_noticed(tmp_path, ranks):
    def run():
        save_steps(tmp_path, 2, 4)
        files = sorted((tmp_path / "step-4").iterdir())
        assert len(files) == ranks + 1
        generator = random.Random(0)
        for number in range(60 * len(files)):
            path = files[number % len(files)]
            content = path.read_bytes()
            bit = generator.randrange(8 * len(content))
            dist.barrier()
            if dist.get_rank() == 0:
                damaged = bytearray(content)
                damaged[bit // 8] ^= 1 << bit % 8
                path.write_bytes(damaged)
            dist.barrier()
            step, lines = newest(tmp_path)
            assert step == 2, f"bit {bit} of {path.name} went unnoticed"
            assert len(lines) == 1 and "step-4" in lines[0]
            dist.barrier()
            if dist.get_rank() == 0:
                path.write_bytes(content)
            dist.barrier()
        assert newest(tmp_path) == (4, [])

    run_ranks(ranks, run)


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "longer"])
@pytest.mark.parametrize("file", ["manifest.json", "rank-00000.safetensors"])
def test_a_damaged_file_means_the_checkpoint_before(tmp_path, damage, file):
    def run():
        save_steps(tmp_path, 2, 10)
        path = tmp_path / "step-10" / file
        content = path.read_bytes()
        path.unlink()
        if damage != "missing":
            path.write_bytes({"truncated": content[:-1], "empty": b"", "longer": content + b"x"}[damage])
        step, lines = newest(tmp_path)
        assert step == 2 and str(path.parent) in lines[0]
        shutil.rmtree(tmp_path / "step-2")
        assert newest(tmp_path)[0] is None
        with pytest.raises(CheckpointError, match="step-10"):
            checkpoint.verify(checkpoint.open_checkpoint(tmp_path / "step-10"))

    run_ranks(1, run)


def test_unfinished_folders_and_strangers_are_ignored(tmp_path):
    def run():
        save_steps(tmp_path, 3)
        shutil.copytree(tmp_path / "step-3", tmp_path / "step-9.writing")
        (tmp_path / "step-old").mkdir()
        (tmp_path / "notes.txt").write_text("step-77")
        assert newest(tmp_path) == (3, [])
        save_steps(tmp_path, 9)  # over the half-written one
        assert newest(tmp_path) == (9, []) and not (tmp_path / "step-9.writing").exists()
        assert newest(tmp_path / "nowhere") == (None, [])

    run_ranks(1, run)
