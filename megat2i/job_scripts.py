"""Job scripts for SLURM: a file of tools/slurm with its options and settings filled in."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "tools" / "slurm"
DIRECTIVE = "#SBATCH --"


def job_script(
    name: str, options: Mapping[str, str | int | None], settings: Mapping[str, str], arguments: Sequence[str] = ()
) -> str:
    """``tools/slurm/NAME.sbatch`` as one file that needs nothing else on its command line or in its environment.

    ``options`` are sbatch's and replace those of the file, None: leaves one out; an empty one has no value.
    ``settings`` are the variables that the file names, and ``arguments`` its command line.
    """
    lines = (FOLDER / f"{name}.sbatch").read_text().splitlines()
    numbers = [number for number, line in enumerate(lines) if line.startswith(DIRECTIVE)]
    pairs = (lines[number].removeprefix(DIRECTIVE).partition("=") for number in numbers)
    merged = {option: value for option, _, value in pairs} | dict(options)
    directives = [
        f"{DIRECTIVE}{option}={value}" if value != "" else f"{DIRECTIVE}{option}"
        for option, value in merged.items()
        if value is not None
    ]
    assignments = [f"{variable}={shlex.quote(value)}" for variable, value in settings.items()]
    if arguments:
        assignments.append(f"set -- {shlex.join(arguments)}")
    return "\n".join([*lines[:2], *directives, *assignments, *lines[numbers[-1] + 1 :], ""])
