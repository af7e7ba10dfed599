"""What a run still knows of language: completions of prompts, perplexity of held-out text, and a few-shot probe.

    python tools/probe_text.py --pretrained pretrained/open_lm_1b --runs runs/mine --prompts prompts.txt \
        --wordnet data/wordnet --text data/text_valid --output probe.json

``--prompts``: one a line, in which \\n stands for a line break. The probe asks what WordNet's words are a kind of, four
answers to choose from. The pre-trained model comes first, in the runs' tokens and windows; of every run the newest
checkpoint is probed. Probability is given to text ids alone.
"""

import argparse
import json
import sys
from pathlib import Path

import megat2i  # noqa: F401 (before torch: it sets how threads wait)

# isort: split
import torch

from megat2i.checkpoint import CheckpointError
from megat2i.config import ConfigError
from megat2i.data import wordnet
from megat2i.data.indexed import IndexedDataset
from megat2i.experiments.text_probe import ANSWERS, SHOTS, TextModel, questions
from megat2i.files import DataFileError, write_file
from megat2i.printable import ArgumentParser


def main() -> None:
    """Probe every checkpoint of every run and write one JSON file."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained", type=Path, required=True, metavar="DIR", help="what model.pretrained names")
    parser.add_argument("--runs", nargs="+", type=Path, required=True, metavar="RUN", help="of one data and length")
    parser.add_argument("--prompts", type=Path, required=True, help="one prompt a line")
    parser.add_argument("--wordnet", type=Path, required=True, help="folder of WordNet's archive")
    parser.add_argument("--text", type=Path, required=True, metavar="PREFIX", help="store of held-out text")
    parser.add_argument("--windows", type=int, default=256, help="of the held-out text, at most")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=24, help="most tokens of a completion")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    prompts = [line.replace("\\n", "\n") for line in arguments.prompts.read_text().splitlines() if line.strip()]
    asked = questions(wordnet.entries(wordnet.download(arguments.wordnet)), arguments.questions)
    result = {"shots": SHOTS, "chance": 1 / ANSWERS, "questions": len(asked), "prompts": prompts, "models": []}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def probe(name: str, model: TextModel) -> None:
        right = model.answers(asked)
        entry = {"run": name, "step": model.step, "accuracy": sum(right) / len(right)}
        entry["perplexity"] = model.perplexity(IndexedDataset(arguments.text), arguments.windows)
        entry["completions"] = [model.complete(prompt, arguments.tokens) for prompt in prompts]
        result["models"].append(entry | {"right": right})
        print(f"{name}: {entry['accuracy']:.1%} right, perplexity {entry['perplexity']:.1f}", flush=True)

    probe(arguments.pretrained.name, TextModel.from_run(arguments.runs[0], device).beginning_from(arguments.pretrained))
    for run in arguments.runs:
        probe(run.name, TextModel.from_run(run, device))
    write_file(arguments.output, (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, DataFileError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
