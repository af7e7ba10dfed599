"""pretrain_t2i.py with slower steps, so that what hits a job hits a step; absent ranks do nothing.

PACE: file with the seconds that each step takes longer. ABSENT: file with the number of the rank that does not come.
"""

import os
import runpy
import sys
import time
from pathlib import Path

import megat2i  # noqa: F401 (before torch: it sets how threads wait)

# isort: split
from megat2i import trainer

absent = Path(os.environ.get("ABSENT", ""))
if absent.is_file() and absent.read_text() == os.environ["SLURM_PROCID"]:
    time.sleep(600)

step = trainer.train_step


def paced(*arguments, **options):
    time.sleep(float(Path(os.environ["PACE"]).read_text()))
    return step(*arguments, **options)


trainer.train_step = paced
script = Path(__file__).resolve().parents[3] / "pretrain_t2i.py"
sys.argv[0] = str(script)
runpy.run_path(str(script), run_name="__main__")
