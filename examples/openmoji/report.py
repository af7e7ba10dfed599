"""The results of the demo: ``python examples/openmoji/report.py --run runs/demo``.

Writes into the run folder ``report.html`` (a page that needs no network), ``samples.png``, ``curves.png`` and
``quality.json``. It draws the prompts of 200 training and 100 held-out pictures, measures how often a drawing is
nearest to its own true picture, and plots the losses of ``metrics.jsonl``. ``--readme docs/images`` also makes the
README's pictures.
"""

import megat2i  # noqa: F401 (before torch: it sets how long OpenMP's waiting threads spin)

# isort: split
import argparse
import json
import sys
from pathlib import Path

import torch
from curves import PANELS, curves_png, panel_png, read_record
from page import report_page
from samples import Samples, readme_sheets, sample_splits, samples_sheet, training_pictures

from megat2i import config, run_folder
from megat2i.checkpoint import CheckpointError
from megat2i.config import Config, ConfigError
from megat2i.data.manifest import Manifest
from megat2i.drawn import read_steps
from megat2i.files import DataFileError, read_json_object, write_file
from megat2i.generate import Sampler
from megat2i.interrupt import said_on_interrupt
from megat2i.pictures import save_png
from megat2i.printable import ArgumentParser
from megat2i.progress import Progress

SOURCE = "openmoji"  # as the manifest of tools/preprocess_data.py names it


def main() -> None:
    """Make the files."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run folder of the demo")
    parser.add_argument("--readme", type=Path, metavar="FOLDER", help="also make the README's pictures there")
    arguments = parser.parse_args()
    make_report(arguments.run, arguments.readme)


def make_report(folder: Path, readme: Path | None = None) -> None:
    """Write everything about the run in ``folder``, and the README's pictures to ``readme``."""
    settings = config.load(folder / "config.yaml")
    require_openmoji(folder, settings)
    record, steps = read_record(folder), read_steps(folder)
    environment = read_json_object(folder / run_folder.ENVIRONMENT, "Train the run first")
    with Progress(None, "plotting the curves", ""):
        write_file(folder / "curves.png", curves_png(record, str(folder)))
        panels = [panel_png(record, quantity) for quantity in PANELS]
    sampler, settings = Sampler.from_run(folder, torch.device("cpu"), torch.float32)
    samples = sample_splits(sampler, settings.sampling)
    quality = measured(samples)
    write_file(folder / "quality.json", (json.dumps(quality, indent=1) + "\n").encode())
    with Progress(None, "writing the pages", ""):
        training = training_pictures(settings, sampler.image_tokenizer)
        save_png(samples_sheet(samples, training, settings.sampling), folder / "samples.png")
        content = report_page(folder, settings, environment, record, panels, samples, quality, steps)
        write_file(folder / "report.html", content)
        for name, picture in readme_sheets(samples, steps).items() if readme else ():
            save_png(picture, readme / name)


def require_openmoji(folder: Path, settings: Config) -> None:
    """Raises ConfigError where the run's data are not OpenMoji's pictures, or not those of the run any more."""
    saved = read_json_object(folder / run_folder.DATA, "Train the run first")
    prefixes = [dataset.prefix for dataset in settings.data.train]
    prefixes += [settings.data.valid] if settings.data.valid else []
    for prefix in prefixes:
        manifest = Manifest.read(prefix)
        if manifest is None:
            raise ConfigError(f"{prefix}.json: not found; start the report in the folder that the run was started in")
        sources = sorted({source.name for source in manifest.sources})
        if sources != [SOURCE]:
            raise ConfigError(
                f"{folder} was trained on {prefix}, made from {', '.join(sources)}, and this report compares with the "
                "demo's OpenMoji pictures; draw from this run with tools/generate.py --prompts"
            )
    present = run_folder.data_identity(settings)
    changed = [prefix for prefix in prefixes if saved.get(prefix) != present[prefix]]
    if changed:
        raise ConfigError(f"{changed[0]} has changed since {folder} was trained on it; train a new run on it")


def measured(samples: dict[str, Samples]) -> dict[str, dict]:
    """What quality.json holds, by kind of prompt; printed in short."""
    quality = {}
    for name, part in samples.items():
        quality[name] = result = part.measures()
        rates = ", ".join(
            f"{s} {result[s]['rate']:.0%} (chance {result[s]['chance']:.0%})" for s in ("pixel", "feature")
        )
        print(f"{name}: nearest to its own true picture among 10: {rates}; empty pictures: {result['empty']}")
    return quality


if __name__ == "__main__":
    try:
        with said_on_interrupt("interrupted; the same command makes the report"):
            main()
    except (ConfigError, DataFileError, CheckpointError) as error:
        sys.exit(f"error: {error}")
