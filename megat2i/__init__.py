"""megat2i: training of auto-regressive text-to-image models."""

import os

# OpenMP's threads spin while they wait. On a machine that does anything else at the same time, a training step on the
# CPU becomes several times slower for it. The variable is read when PyTorch is loaded, so it counts for programs that
# import megat2i before torch: pretrain_t2i.py, and tools/demo.py with all that it starts.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
