"""Checkpoints that know no layout: every tensor by global name and shape, whatever ranks and engine wrote it.

``<run>/checkpoints/step-N/`` holds one safetensors file a rank and ``manifest.json``. A part of a file names its global
tensor and the boxes of it that its values fill, in their order; its SHA-256 is taken in memory before it is written.
Readers compare it, dtype and shape, and the SHA-256 of the file's header: every byte is under a digest. A checkpoint is
committed by renaming a complete, fsynced temporary folder, with the manifest written last; the newest one that
verifies wins, and all ranks agree on it. No pickle anywhere.

Master weights, Adam's moments and the step are all the state there is: the order of the samples and the dropped
captions are pure functions of the step, and training draws no random numbers.
"""

from megat2i.checkpoint.agreement import CheckpointError, first_problem, first_rank_decides
from megat2i.checkpoint.changing import write_changed
from megat2i.checkpoint.folder import Checkpoint, committed, open_checkpoint, verify
from megat2i.checkpoint.loading import latest, latest_here, load_engine, load_weights, read_tensor, weight_shapes
from megat2i.checkpoint.rewinding import go_back
from megat2i.checkpoint.saving import Saved, finish, longest_save, save

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Saved",
    "committed",
    "finish",
    "first_problem",
    "first_rank_decides",
    "go_back",
    "latest",
    "latest_here",
    "load_engine",
    "load_weights",
    "longest_save",
    "open_checkpoint",
    "read_tensor",
    "save",
    "verify",
    "weight_shapes",
    "write_changed",
]
