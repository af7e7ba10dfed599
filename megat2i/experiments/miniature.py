"""The experiments on one machine (scales nano and smoke): their data, and every command as a job.

Real data only: OpenMoji pictures with captions, WordNet as the language model's English.
"""

import json
import random
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from megat2i import config
from megat2i.config import ConfigError
from megat2i.data import wordnet
from megat2i.data.manifest import Manifest, Source
from megat2i.data.openmoji import captioned_images, render
from megat2i.data.sizes import with_vocabulary
from megat2i.data.stored_pictures import stored_pictures
from megat2i.data.text_store import write_text_store
from megat2i.experiments.arms import LANGUAGE_MODEL, Arm, Scale, is_alignment, length, twins
from megat2i.experiments.evaluations import picture_jobs, probe_job, reference, tool
from megat2i.experiments.jobs import Job, JobError
from megat2i.files import write_file
from megat2i.pictures import enlarge, save_png
from megat2i.tokenizers.text import load_text_tokenizer, train_text_tokenizer

IMAGE_SIZE, PATCH_SIZE = 48, 6
MICRO_BATCH = 32  # sequences, at most
SMOKE_ENTRIES = 2000  # of WordNet
DRAWN = {"nano": 2048, "smoke": 16}  # pictures of each twin; fewer make the distance biased
QUESTIONS = {"nano": 1000, "smoke": 50}  # of the few-shot probe
ALIGNED_PAIRS = {"nano": 1024, "smoke": 8}  # the paper's N
ALIGNED_STEPS = {"nano": 400, "smoke": 10}


class Miniature:
    """Files and jobs of one reproduction: ``folder`` holds what comes out, ``data`` what goes in.

    Raises ConfigError where neither the configuration nor finished data say how large the vocabulary is.
    """

    def __init__(self, scale: Scale, folder: Path, data: Path, dtype: str):
        self.scale, self.folder, self.data, self.dtype = scale, folder, data, dtype
        self.pretrained = folder / "pretrained"
        pictures = Manifest.read(data / "train")
        # a user's pictures bring their text tokenizer, and the language model learns that one
        self.tokenizer = data / (pictures.text.tokenizer if pictures else "text_tokenizer.json")
        train = f"data.train={train_list(data / 'train')}"
        self.shared = with_vocabulary(config.load(scale.config, [*scale.settings, train]))
        if None in (self.shared.vocab.text_tokens, self.shared.vocab.image_codes):
            raise ConfigError(
                f"{scale.config}: vocab.text_tokens and vocab.image_codes say what data to make; set them"
            )

    def prepare(self) -> None:
        """Make what is not there yet: text tokenizer, text and picture stores, and the true pictures of the prompts.

        Raises DataFileError, JobError.
        """
        archive = wordnet.download(self.data / "wordnet")
        if not Manifest.read(self.data / "text_valid"):
            entries = wordnet.entries(archive)
            if self.scale.name == "smoke":
                entries = entries[:: len(entries) // SMOKE_ENTRIES]
            texts = {"text_train": [], "text_valid": []}
            for entry in entries:
                texts["text_valid" if entry.held_out else "text_train"].append(entry.text() + "\n")
            if not self.tokenizer.exists() and not Manifest.read(self.data / "train"):
                train_text_tokenizer(texts["text_train"], self.shared.vocab.text_tokens, self.tokenizer)
            tokenizer = load_text_tokenizer(self.tokenizer)
            for name, lines in texts.items():
                if not Manifest.read(self.data / name):
                    source = Source("WordNet 3.0", len(lines), sha256=wordnet.SHA256)
                    write_text_store(lines, tokenizer, self.data / name, [source])
        for name, command in self.picture_commands().items():
            # a tool that was stopped goes on where it was
            if not Manifest.read(self.data / name) and subprocess.run(command).returncode:
                raise JobError(f"{shlex.join(command)} failed; once that is mended, the same command goes on")
        self._write_reference()

    def _write_reference(self) -> None:
        """``reference/``: true pictures of training captions; reference.jsonl lists them in the order of drawing."""
        lines, pictures = [], self.folder / "reference"
        pictures.mkdir(parents=True, exist_ok=True)
        for number, (caption, picture) in enumerate(self._true_pictures(DRAWN[self.scale.name])):
            path = pictures / f"{number:05d}.png"
            if not path.exists():
                save_png(picture, path)
            lines.append({"prompt": caption, "file": str(path)})
        write_file(reference(self.folder), "".join(json.dumps(line) + "\n" for line in lines).encode())

    def _true_pictures(self, number: int) -> Iterator[tuple[str, Image.Image]]:
        """OpenMoji's are drawn again; of other data there are the codes alone, hence what the tokenizer left."""
        if is_openmoji(self.data):
            for drawing in random.Random(0).sample(captioned_images("train"), number):
                yield drawing.caption, render(drawing.characters, IMAGE_SIZE)
            return
        documents = Manifest.read(self.data / "train").documents
        chosen = random.Random(0).sample(range(documents), min(number, documents))
        for caption, picture in stored_pictures(self.data / "train", chosen):
            yield caption, enlarge(picture, picture.shape[-1])

    def jobs(self, arms: list[Arm], experiments: list[str]) -> list[Job]:
        """Every command of ``experiments``, each before those that need it."""
        jobs: list[Job] = []
        for arm in arms:
            jobs.append(self._training(arm))
            if arm.name == LANGUAGE_MODEL:
                command = tool("convert_checkpoint.py", "--from", "run", self._run(arm.name), self.pretrained)
                jobs.append(Job("pretrained", command, self.pretrained, needs=(arm.name,)))
        if "fig5" in experiments:
            protocol = ("--protocol", "nano")
            for arm in twins(self.scale):
                jobs += picture_jobs(arm, self.folder, self.folder / "reference", *protocol)
        if "table1" in experiments:
            number = QUESTIONS[self.scale.name]
            jobs.append(probe_job(twins(self.scale), self.folder, self.pretrained, self.data, number))
        return jobs

    def picture_commands(self) -> dict[str, tuple[str, ...]]:
        """The command that makes each picture store."""

        def preprocess(split: str, name: str, *image: str | Path) -> tuple[str, ...]:
            return tool(
                "preprocess_data.py", "--input", "openmoji", "--split", split, "--output-prefix", self.data / name,
                "--text-tokenizer", self.tokenizer, "--workers", 1, *image,
            )  # fmt: skip

        codes = self.shared.vocab.image_codes
        fitted = ("--image-tokenizer", "patch", "--image-size", IMAGE_SIZE, "--patch-size", PATCH_SIZE)
        train = preprocess("train", "train", *fitted, "--codebook-size", codes)
        valid = preprocess("valid", "valid", "--image-tokenizer", self.data / "image_tokenizer.safetensors")
        return {"train": train, "valid": valid}

    def _training(self, arm: Arm) -> Job:
        files = {"{pretrained}": self.pretrained}
        files |= {f"{{{need}}}": self._run(need) / "image_embeddings.safetensors" for need in arm.needs}
        settings = dict(one.split("=", 1) for one in (*self.settings(), *arm.settings))
        settings |= length(arm, self.scale.steps, self.shared.training.warmup_steps)
        if arm.name == LANGUAGE_MODEL:
            settings |= dict(one.split("=", 1) for one in arm.settings)
            settings |= {
                "data.train": train_list(self.data / "text_train"),
                "data.valid": str(self.data / "text_valid"),
                "data.valid_text": "null",
            }
        elif is_alignment(arm):
            pairs = str(ALIGNED_PAIRS[self.scale.name])
            settings |= {"training.global_batch_size": pairs, "training.micro_batch_size": pairs}
            settings |= {"training.steps": str(ALIGNED_STEPS[self.scale.name]), "data.valid_text": "null"}
        else:
            batch = int(settings.get("training.global_batch_size", self.scale.batch))
            settings["training.micro_batch_size"] = str(max(d for d in range(1, MICRO_BATCH + 1) if batch % d == 0))
        overrides = [f"{key}={files.get(value, value)}" for key, value in settings.items()]
        command = (
            sys.executable, arm.tool, "--config", self.scale.config, f"run.dir={self._run(arm.name)}", *overrides
        )  # fmt: skip
        needs = tuple("pretrained" if need == LANGUAGE_MODEL else need for need in arm.needs)
        stores = ("text_train", "text_valid") if arm.name == LANGUAGE_MODEL else ("train", "valid", "text_valid")
        inputs = (Path(self.scale.config), *(self.data / f"{store}.json" for store in stores))
        return Job(arm.name, command, self._run(arm.name), needs, int(settings["training.steps"]), inputs)

    def settings(self) -> tuple[str, ...]:
        """What all runs of this reproduction share beyond the scale's configuration."""
        return (
            *self.scale.settings,
            f"data.train={train_list(self.data / 'train')}",
            f"data.valid={self.data / 'valid'}",
            f"data.valid_text={self.data / 'text_valid'}",
            f"runtime.dtype={self.dtype}",
        )

    def _run(self, name: str) -> Path:
        return self.folder / "runs" / name


def is_openmoji(data: Path) -> bool:
    """Whether the pictures in this folder of datasets are the ones that are made where there are none."""
    manifest = Manifest.read(data / "train")
    return manifest is None or [source.name for source in manifest.sources] == ["openmoji"]


def train_list(prefix: Path) -> str:
    """``data.train`` of one dataset, as YAML that any path can stand in."""
    return f"[{{prefix: {json.dumps(str(prefix))}}}]"
