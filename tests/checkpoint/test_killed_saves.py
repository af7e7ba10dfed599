"""A kill at any file operation of a save: the newest sound checkpoint is the one before or the new one."""

import shutil
from functools import partial

import pytest
import torch.distributed as dist
from kill_points import exit_code, kill_points
from numbered_engine import newest, save_steps

from megat2i import checkpoint


def alone(action) -> None:
    """``action`` in a process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    action()


@pytest.mark.parametrize("background", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_kill_at_any_point_of_a_save_loses_nothing(tmp_path, background):
    begun, folder = tmp_path / "begun", tmp_path / "checkpoints"
    assert exit_code(partial(alone, partial(save_steps, begun, 1, 2, 3))) == 0

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(begun, folder)

    def save() -> None:
        save_steps(folder, 4, keep=2, background=background)
        checkpoint.finish()

    def resume() -> None:
        step, lines = newest(folder)
        assert step in (3, 4) and not lines
        save_steps(folder, 5, keep=2)
        assert newest(folder) == (5, [])
        assert sorted(path.name for path in folder.iterdir()) == [f"step-{step}", "step-5"]

    points = 0
    for number in kill_points(folder, prepare, partial(alone, save)):
        points = number
        assert exit_code(partial(alone, resume)) == 0, number
    assert points >= 20
