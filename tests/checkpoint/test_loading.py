"""Loading: into any layout, nothing but what is needed, never another model's state, and without pickle."""

import sys
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from numbered_engine import Layout, NumberedEngine, Split, flat_engine, newest, rewrite_manifest, save_steps

from megat2i import checkpoint
from megat2i.checkpoint import CheckpointError


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    def run():
        save_steps(tmp_path, 3)
        with pytest.raises(CheckpointError, match="shape"):
            checkpoint.load_engine(checkpoint.open_checkpoint(tmp_path / "step-3"), flat_engine(200))
        wider = NumberedEngine({"w": Split((300,)), "v": Split((9, 4))}, Layout())
        with pytest.raises(CheckpointError, match=r"elements \[0, 0\] to \[9, 4\] of v"):
            checkpoint.load_engine(checkpoint.open_checkpoint(tmp_path / "step-3"), wider)
        assert all(torch.isnan(part.values).all() for part in wider.fragments()), "changed before it was refused"
        with pytest.raises(CheckpointError, match="holds exp_avg of w, which this run does not have"):
            checkpoint.load_engine(
                checkpoint.open_checkpoint(tmp_path / "step-3"), NumberedEngine({"v": Split((300,))}, Layout())
            )
        rewrite_manifest(tmp_path / "step-3" / "manifest.json", format=1)
        with pytest.raises(CheckpointError, match="format 1"):
            checkpoint.open_checkpoint(tmp_path / "step-3")

    run_ranks(1, run)


def test_loading_unpickles_nothing(tmp_path):
    def run():
        save_steps(tmp_path, 2)
        events = []
        sys.addaudithook(lambda name, _: events.append(name) if name == "pickle.find_class" else None)
        assert newest(tmp_path) == (2, [])
        assert events == []
        import pickle

        pickle.loads(pickle.dumps(Path("x")))
        assert events, "the hook sees nothing"

    run_ranks(1, run)
