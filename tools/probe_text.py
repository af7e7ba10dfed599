"""What a run still knows of language: completions, held-out perplexity is in its metrics, and a few-shot probe.

    python tools/probe_text.py --runs runs/lm runs/mine --tokenizer data/text_tokenizer.json --prompts prompts.txt \
        --wordnet data/wordnet --output probe.json

``--prompts``: one a line, in which \\n stands for a line break. The probe asks what WordNet's words are a kind of, four
answers to choose from. Every checkpoint that a run has kept is probed.
"""

import argparse
import json
import sys
from pathlib import Path

from megat2i import checkpoint
from megat2i.checkpoint import CheckpointError
from megat2i.config import ConfigError
from megat2i.data import wordnet
from megat2i.experiments.text_probe import ANSWERS, SHOTS, TextModel, questions
from megat2i.files import DataFileError, write_file


def main() -> None:
    """Probe every checkpoint of every run and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", type=Path, required=True, metavar="RUN")
    parser.add_argument("--tokenizer", type=Path, required=True, help="the text tokenizer of all of them")
    parser.add_argument("--prompts", type=Path, required=True, help="one prompt a line")
    parser.add_argument("--wordnet", type=Path, required=True, help="folder of WordNet's archive")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=24, help="most tokens of a completion")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    prompts = [line.replace("\\n", "\n") for line in arguments.prompts.read_text().splitlines() if line.strip()]
    asked = questions(wordnet.entries(wordnet.download(arguments.wordnet)), arguments.questions)
    result = {"shots": SHOTS, "chance": 1 / ANSWERS, "questions": len(asked), "prompts": prompts, "models": []}
    for run in arguments.runs:
        for folder in reversed(checkpoint.committed(run / "checkpoints")):
            model = TextModel.from_run(run, arguments.tokenizer, int(folder.name.removeprefix("step-")))
            completions = [model.complete(prompt, arguments.tokens) for prompt in prompts]
            entry = {"run": run.name, "step": model.step, "accuracy": model.accuracy(asked), "completions": completions}
            result["models"].append(entry)
            print(f"{run}, step {model.step}: {entry['accuracy']:.1%} of {len(asked)} questions", flush=True)
    write_file(arguments.output, (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, DataFileError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
