"""megat2i: training of auto-regressive text-to-image models."""

import os

# GNU OpenMP's threads spin for 300,000 rounds while they wait. On a machine that does anything else at the same time a
# training step on the CPU then takes ten times as long; with 1,500 rounds it loses nothing on a quiet one. The variable
# is read when PyTorch is loaded, so it counts for programs that import megat2i before torch: pretrain_t2i.py, and
# tools/demo.py with all that it starts.
os.environ.setdefault("GOMP_SPINCOUNT", "1500")
