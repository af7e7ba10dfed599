"""Which layout to train a config with: memory, speed and hours of every sensible one, without a GPU.

``python tools/plan.py --config configs/open_lm_1b_t2i.yaml --gpus 64 --gpu a100-80`` prints the best layouts, what they
spend memory and time on, and what does not fit. ``--json FILE`` writes all of them, best first. ``--write`` puts the
output into the config as its plan comment. ``--validate`` compares the planner with published training runs.
``--measured benchmarks/results/FILE`` takes coefficients from a record of the benchmarks, and shows the time of a step
that the planner predicts beside the measured one.
"""

import argparse
import json
import sys
from pathlib import Path

from megat2i import config
from megat2i.config import ConfigError
from megat2i.data.sizes import with_data_sizes
from megat2i.files import DataFileError, write_file
from megat2i.planner.hardware import GPUS
from megat2i.planner.layout import Job
from megat2i.planner.measured import Measured
from megat2i.planner.ranking import plan
from megat2i.planner.report import report, validation
from megat2i.printable import ArgumentParser

BEGIN, END = "# --- plan ---", "# --- end of plan ---"


def main() -> None:
    """Print a plan or the validation."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file of the model and the batch")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="set a field of the configuration")
    parser.add_argument("--gpus", type=int, default=64, help="number of GPUs, eight in a node (default: 64)")
    parser.add_argument("--gpu", choices=tuple(GPUS), default="a100-80")
    parser.add_argument("--json", type=Path, help="write all layouts here")
    parser.add_argument("--write", action="store_true", help="write the plan into the config as a comment")
    parser.add_argument("--validate", action="store_true", help="compare with published training runs and leave")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="a record of the benchmarks on such a GPU")
    arguments = parser.parse_intermixed_args()
    if arguments.validate:
        print(validation(), end="")
        return
    if arguments.config is None or arguments.gpus < 1:
        parser.error("name a --config, and 1 or more --gpus")
    settings = with_data_sizes(config.load(arguments.config, arguments.overrides))
    gpu, text = GPUS[arguments.gpu], ""
    if arguments.measured:
        measured = Measured.read(arguments.measured)
        gpu = measured.calibrated(gpu)
        text = measured.report(settings, gpu) + "\n"
    planned = plan(Job.of(settings), arguments.gpus, gpu)
    text += report(planned)
    print(text, end="")
    if arguments.json:
        content = json.dumps({"layouts": [p.as_dict() for p in planned]}, indent=1) + "\n"
        write_file(arguments.json, content.encode())
    if arguments.write:
        machine = f"{' '.join([*arguments.overrides, ''])}--gpus {arguments.gpus} --gpu {arguments.gpu}"
        machine += f" --measured {arguments.measured}" if arguments.measured else ""
        command = f"python tools/plan.py --config configs/{arguments.config.name} {machine}"
        write_file(arguments.config, with_comment(arguments.config.read_text(), f"{command}\n\n{text}").encode())


def with_comment(yaml: str, text: str) -> str:
    """``yaml`` with ``text`` as its plan comment: in the place of the old one, else before the first section."""
    comment = "\n".join([BEGIN, *(f"# {line}".rstrip() for line in text.splitlines()), END])
    if BEGIN in yaml:
        before, rest = yaml.split(BEGIN, 1)
        return before + comment + rest.split(END, 1)[1]
    lines = yaml.splitlines(keepends=True)
    first = next(number for number, line in enumerate(lines) if line.strip() and not line.startswith("#"))
    return "".join(lines[:first]) + comment + "\n" + "".join(lines[first:])


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, DataFileError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
