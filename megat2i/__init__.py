"""megat2i: training of auto-regressive text-to-image models."""

import os

# OpenMP's threads spin while they wait. On a machine that does anything else at the same time, a training step on the
# CPU becomes several times slower for it. Read when PyTorch is loaded, so it stands before every import of torch.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
