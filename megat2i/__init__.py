"""megat2i: training of auto-regressive text-to-image models."""

import importlib.util
import os

# GNU OpenMP's threads spin for 300,000 rounds while they wait. On a machine that does anything else at the same time a
# training step on the CPU then takes ten times as long; with 1,500 rounds it loses nothing on a quiet one. The variable
# is read when PyTorch is loaded, so it counts for programs that import megat2i before torch, as all of ours do.
os.environ.setdefault("GOMP_SPINCOUNT", "1500")

if importlib.util.find_spec("megat2i.kernels") is None:  # a checkout beside an installed wheel: it lies in kernels/
    raise ModuleNotFoundError(
        "megat2i.kernels is missing: the checkout hides the installed package. Install it editable, by "
        "`pip install --no-build-isolation -e .` in the checkout, or run from another folder"
    )
