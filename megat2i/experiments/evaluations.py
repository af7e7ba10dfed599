"""What follows training, at any scale: pictures and their distances (Fig. 5), and what is left of language (Table 1).

``folder`` is that of the reproduction. It holds ``reference.jsonl``: prompts and their true pictures, {"prompt",
"file"} a line.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from megat2i.experiments.arms import Arm
from megat2i.experiments.jobs import Job

PROMPTS = Path("configs/paper/prompts.txt")
TEMPERATURE = 1.0  # the distribution itself, which the distance compares
BATCH_SIZE = 64


def tool(name: str, *arguments) -> tuple[str, ...]:
    """The command of one of the project's tools."""
    return (sys.executable, f"tools/{name}", *map(str, arguments))


def picture_jobs(arm: Arm, folder: Path, pictures: Path, *protocol) -> list[Job]:
    """Draw the prompts of ``reference.jsonl`` with a run, and measure the distance to the folder ``pictures``."""
    samples, distance, prompts = folder / "samples" / arm.name, folder / "fid" / f"{arm.name}.json", reference(folder)
    draw = tool(
        "generate.py", "--run", folder / "runs" / arm.name, "--prompts-file", prompts, "--output", samples,
        "--temperature", TEMPERATURE, "--batch-size", BATCH_SIZE,
    )  # fmt: skip
    measure = tool(
        "evaluate.py", "fid", "--generated", samples, "--reference", pictures, "--output", distance, *protocol
    )
    drawn = f"samples-{arm.name}"
    return [
        Job(drawn, draw, samples, (arm.name,), inputs=(prompts,), goes_on=True),
        Job(f"fid-{arm.name}", measure, distance, (drawn,)),
    ]


def probe_job(arms: Sequence[Arm], folder: Path, pretrained: Path, data: Path, questions: int) -> Job:
    """Probe the language model in ``pretrained``, and the runs ``arms``."""
    output = folder / "table1.probe.json"
    command = tool(
        "probe_text.py", "--pretrained", pretrained, "--runs", *(folder / "runs" / arm.name for arm in arms),
        "--prompts", PROMPTS, "--wordnet", data / "wordnet", "--text", data / "text_valid", "--questions", questions,
        "--output", output,
    )  # fmt: skip
    return Job("probe", command, output, tuple(arm.name for arm in arms), inputs=(PROMPTS,))


def reference(folder: Path) -> Path:
    return folder / "reference.jsonl"
